"""How images are cut into the square tiles that the vision tower takes.

The rule is InternVL's (arXiv 2404.16821, section 3.2, `dynamic_preprocess`), which TokenFLEX uses
too: among all grids of min_tiles .. max_tiles tiles the one whose aspect ratio is closest, the
image stretched to fill it.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import TypeVar

import numpy as np

Count = TypeVar("Count", int, np.ndarray)

# Images times candidate grids that are compared at once: two arrays of doubles in the cache.
_AT_ONCE = 1 << 16


def check_tiling(tile_size: int, min_tiles: int, max_tiles: int) -> None:
    """ValueError for settings out of range."""
    if tile_size < 1:
        raise ValueError(f"tile_size is {tile_size}; give the vision tower's image_size")
    if not 1 <= min_tiles <= max_tiles:
        raise ValueError(
            f"min_tiles is {min_tiles} and max_tiles {max_tiles}; both must be at least 1, and "
            "max_tiles the larger"
        )


def grids_for(
    widths: np.ndarray, heights: np.ndarray, tile_size: int, min_tiles: int, max_tiles: int
) -> np.ndarray:
    """(columns, rows) of the grids for images of these sizes in pixels, int64 [I] each.

    The closest aspect ratio (columns / rows to width / height) wins. Among grids that are equally
    close, a larger one is taken if the image has more than half as many pixels as it.

    Returns int64 [I, 2].
    """
    grids, aspects, half_areas = _candidate_grids(tile_size, min_tiles, max_tiles)
    chosen = np.empty(len(widths), np.int64)
    step = max(1, _AT_ONCE // len(grids))
    for start in range(0, len(widths), step):
        width, height = widths[start : start + step], heights[start : start + step]
        difference = np.abs(width / height - aspects)  # [G, I], fewest tiles first
        closest = difference == difference.min(0)
        larger = closest & (width * height > half_areas)
        last = len(grids) - 1 - larger[::-1].argmax(0)
        chosen[start : start + step] = np.where(larger.any(0), last, closest.argmax(0))
    return grids[chosen]


def grid_for(
    width: int, height: int, tile_size: int, min_tiles: int, max_tiles: int
) -> tuple[int, int]:
    """(columns, rows) of the grid for one image; see `grids_for`."""
    sizes = np.array([[width], [height]], np.int64)
    columns, rows = grids_for(sizes[0], sizes[1], tile_size, min_tiles, max_tiles)[0].tolist()
    return columns, rows


def count_tiles(cells: Count, thumbnail: bool) -> Count:
    """Number of tiles of a grid with so many cells, of one or many; one cell has no thumbnail."""
    return cells + (thumbnail & (cells > 1))


def cut_tiles(
    resize: Callable[[int, int], np.ndarray],
    grid: tuple[int, int],
    tile_size: int,
    thumbnail: bool,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """The tiles of a picture, row by row, the thumbnail last: uint8 [tiles, 3, size, size].

    resize: gives the whole picture in a width and height, uint8 [3, height, width].
    grid: (columns, rows). out: the array to write into and return, of that very shape.
    """
    (columns, rows), size = grid, tile_size
    cells = columns * rows
    shape = (count_tiles(cells, thumbnail), 3, size, size)
    tiles = np.empty(shape, np.uint8) if out is None else out
    assert tiles.shape == shape and tiles.flags.c_contiguous
    planes = resize(columns * size, rows * size).reshape(3, rows, size, columns, size)  # a view
    tiles[:cells].reshape(rows, columns, 3, size, size)[:] = planes.transpose(1, 3, 0, 2, 4)
    if len(tiles) > cells:
        tiles[-1] = resize(size, size)
    return tiles


@lru_cache(maxsize=64)
def _candidate_grids(
    tile_size: int, min_tiles: int, max_tiles: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Grids of min_tiles .. max_tiles tiles, fewest tiles first, then by columns.

    Returns (columns, rows), int64 [G, 2]; columns / rows and half of the pixels, float64 [G, 1].
    """
    found = [
        (columns, rows)
        for columns in range(1, max_tiles + 1)
        for rows in range(1, max_tiles // columns + 1)
        if columns * rows >= min_tiles
    ]
    grids = np.array(sorted(found, key=lambda grid: (grid[0] * grid[1], grid)), np.int64)
    return grids, grids[:, :1] / grids[:, 1:], 0.5 * tile_size**2 * grids.prod(1, keepdims=True)
