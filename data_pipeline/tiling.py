"""Cutting an image into the square tiles that the vision encoder takes.

The rule is InternVL's (arXiv 2404.16821, section 3.2, `dynamic_preprocess`), which TokenFLEX uses
too: among all grids of min_tiles .. max_tiles tiles the one whose aspect ratio is closest, the
image stretched to fill it.
"""

from functools import lru_cache

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator


class TilingSettings(BaseModel):
    """How images are cut into tiles."""

    model_config = ConfigDict(extra="forbid")

    tile_size: int = Field(default=384, ge=1)
    """Side of a tile in pixels: the input size of the vision encoder."""
    min_tiles: int = Field(default=1, ge=1)
    """Least number of tiles in an image's grid, the thumbnail not counted."""
    max_tiles: int = Field(default=1, ge=1)
    """Largest number of tiles in an image's grid, the thumbnail not counted."""
    thumbnail: bool = True
    """Append the whole image as one more tile when the grid has more than one."""

    @model_validator(mode="after")
    def _check_order(self) -> "TilingSettings":
        if self.min_tiles > self.max_tiles:
            raise ValueError(
                f"min_tiles is {self.min_tiles} and max_tiles {self.max_tiles}: "
                "raise max_tiles or lower min_tiles"
            )
        return self


def grid_for(width: int, height: int, settings: TilingSettings) -> tuple[int, int]:
    """(columns, rows) of the grid for an image of this size in pixels.

    The closest aspect ratio (columns / rows to width / height) wins. Among grids that are equally
    close, a larger one is taken if the image has more than half as many pixels as it.
    """
    aspect = width / height
    best, best_difference = (1, 1), float("inf")
    for columns, rows in _candidate_grids(settings.min_tiles, settings.max_tiles):
        difference = abs(aspect - columns / rows)
        tie = difference == best_difference
        pixels = settings.tile_size**2 * columns * rows
        if difference < best_difference or (tie and width * height > 0.5 * pixels):
            best, best_difference = (columns, rows), difference
    return best


def num_tiles(width: int, height: int, settings: TilingSettings) -> int:
    """Number of tiles of an image of this size, the thumbnail included."""
    columns, rows = grid_for(width, height, settings)
    return columns * rows + _has_thumbnail(columns * rows, settings)


def cut_tiles(image: Image.Image, settings: TilingSettings) -> np.ndarray:
    """Cut an RGB image into tiles, row by row, the thumbnail last.

    Returns:
        uint8 [num_tiles, 3, tile_size, tile_size].
    """
    if image.mode != "RGB":
        raise ValueError(f"cut_tiles takes an RGB image, got mode {image.mode}; use decode_rgb")
    size = settings.tile_size
    columns, rows = grid_for(*image.size, settings)
    pixels = _resize(image, columns * size, rows * size)  # [rows * size, columns * size, 3]
    cells = pixels.reshape(rows, size, columns, size, 3).transpose(0, 2, 4, 1, 3)
    tiles = np.empty((num_tiles(*image.size, settings), 3, size, size), dtype=np.uint8)
    tiles[: rows * columns] = cells.reshape(rows * columns, 3, size, size)
    if _has_thumbnail(columns * rows, settings):
        tiles[-1] = _resize(image, size, size).transpose(2, 0, 1)
    return tiles


def _has_thumbnail(grid_tiles: int, settings: TilingSettings) -> bool:
    return settings.thumbnail and grid_tiles > 1


@lru_cache(maxsize=64)
def _candidate_grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """All (columns, rows) with min_tiles <= columns * rows <= max_tiles, fewest tiles first."""
    grids = [
        (columns, rows)
        for columns in range(1, max_tiles + 1)
        for rows in range(1, max_tiles // columns + 1)
        if columns * rows >= min_tiles
    ]
    return tuple(sorted(grids, key=lambda grid: (grid[0] * grid[1], grid)))


def _resize(image: Image.Image, width: int, height: int) -> np.ndarray:
    """uint8 [height, width, 3]."""
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
