"""Cutting an image into the square tiles that the vision encoder takes.

The rule is InternVL's (arXiv 2404.16821, section 3.2, `dynamic_preprocess`), which TokenFLEX uses
too: among all grids of min_tiles .. max_tiles tiles the one whose aspect ratio is closest, the
image stretched to fill it.
"""

from functools import lru_cache
from typing import Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator

Pixels = Image.Image | np.ndarray
"""An RGB picture: Pillow's, or uint8 [height, width, 3]."""

Resample = Literal["pillow", "torch"]
"""What resizes, both bicubic with antialiasing: Pillow's is the reference; torch's is four to eight
times as fast where the processor has AVX2, and differs by 0 to 3 of 255."""


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


def count_tiles(widths: np.ndarray, heights: np.ndarray, settings: TilingSettings) -> np.ndarray:
    """`num_tiles` of many images at once, int64 of the shape of `widths` and `heights` [I]."""
    aspect, area = widths / heights, widths * heights
    best = np.ones(len(aspect), dtype=np.int64)
    best_difference = np.full(len(aspect), np.inf)
    for columns, rows in _candidate_grids(settings.min_tiles, settings.max_tiles):
        difference = np.abs(aspect - columns / rows)
        tie = difference == best_difference
        pixels = settings.tile_size**2 * columns * rows
        take = (difference < best_difference) | (tie & (area > 0.5 * pixels))
        best[take], best_difference[take] = columns * rows, difference[take]
    return best + (settings.thumbnail & (best > 1))


def cut_tiles(image: Image.Image, settings: TilingSettings) -> np.ndarray:
    """Cut an RGB image into tiles, row by row, the thumbnail last.

    Returns:
        uint8 [num_tiles, 3, tile_size, tile_size].
    """
    return cut_grid(image, grid_for(*image.size, settings), settings)


def cut_grid(
    pixels: Pixels,
    grid: tuple[int, int],
    settings: TilingSettings,
    *,
    extent: tuple[float, float] | None = None,
    resample: Resample = "pillow",
    out: np.ndarray | None = None,
) -> np.ndarray:
    """As `cut_tiles`, with the grid (columns, rows) given.

    Args:
        extent: (width, height) of the part of `pixels` that the picture fills, from its upper left
            corner; all of it if None. See `data_pipeline.decode`.
        out: the array to write into and return, uint8 [tiles of the grid, 3, tile_size, tile_size].
    """
    if isinstance(pixels, Image.Image) and pixels.mode != "RGB":
        raise ValueError(f"tiles are cut from RGB, got mode {pixels.mode}; use decode_rgb")
    columns, rows = grid
    size, cells = settings.tile_size, columns * rows
    num = cells + _has_thumbnail(cells, settings)
    tiles = np.empty((num, 3, size, size), np.uint8) if out is None else out
    assert tiles.shape == (num, 3, size, size) and tiles.flags.c_contiguous
    resize = _resize_torch if resample == "torch" else _resize_pillow
    planes = resize(pixels, extent, columns * size, rows * size)
    planes = planes.reshape(3, rows, size, columns, size)  # a view
    tiles[:cells].reshape(rows, columns, 3, size, size)[:] = planes.transpose(1, 3, 0, 2, 4)
    if num > cells:
        tiles[-1] = resize(pixels, extent, size, size)
    return tiles


def as_image(pixels: Pixels) -> Image.Image:
    """A picture as Pillow's."""
    return pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)


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


def _resize_pillow(
    pixels: Pixels, extent: tuple[float, float] | None, width: int, height: int
) -> np.ndarray:
    """uint8 [3, height, width]."""
    box = None if extent is None else (0.0, 0.0, *extent)
    resized = as_image(pixels).resize((width, height), Image.Resampling.BICUBIC, box)
    return np.asarray(resized).transpose(2, 0, 1)


def _resize_torch(
    pixels: Pixels, extent: tuple[float, float] | None, width: int, height: int
) -> np.ndarray:
    """uint8 [3, height, width]."""
    import torch  # takes seconds, which those who only count tiles save

    array = pixels if isinstance(pixels, np.ndarray) else np.array(pixels)
    image = torch.from_numpy(array).permute(2, 0, 1)[None]
    across, down = (array.shape[1], array.shape[0]) if extent is None else extent
    # The operator behind interpolate(antialias=True), which cannot be told a fractional extent.
    resize = torch.ops.aten._upsample_bicubic2d_aa
    return resize(image, [height, width], False, height / down, width / across)[0].numpy()
