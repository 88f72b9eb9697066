"""The settings of tiling, and tiles of the pictures that training decodes.

The rule is `data_pipeline.processor.tiling_tokenflex`'s. On top of it, pictures may be arrays that
an image does not quite fill, and torch may resize them.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import numpy as np
from PIL import Image
from pydantic import Field, model_validator

from data_pipeline.config_file import Settings
from data_pipeline.processor import tiling_tokenflex as rule
from data_pipeline.processor.picture_tokenflex import resize

Pixels = Image.Image | np.ndarray
"""An RGB picture: Pillow's, or uint8 [height, width, 3]."""

Resample = Literal["pillow", "torch"]
"""What resizes, both bicubic with antialiasing: Pillow's is the reference; torch's is four to eight
times as fast where the processor has AVX2, and differs by 0 to 3 of 255."""


class TilingSettings(Settings):
    """How images are cut into tiles."""

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
        rule.check_tiling(self.tile_size, self.min_tiles, self.max_tiles)
        return self


def grid_for(width: int, height: int, settings: TilingSettings) -> tuple[int, int]:
    """(columns, rows) of the grid for an image of this size in pixels."""
    return rule.grid_for(width, height, settings.tile_size, settings.min_tiles, settings.max_tiles)


def num_tiles(width: int, height: int, settings: TilingSettings) -> int:
    """Number of tiles of an image of this size, the thumbnail included."""
    columns, rows = grid_for(width, height, settings)
    return rule.count_tiles(columns * rows, settings.thumbnail)


def count_tiles(widths: np.ndarray, heights: np.ndarray, settings: TilingSettings) -> np.ndarray:
    """`num_tiles` of many images at once, int64 of the shape of `widths` and `heights` [I]."""
    limits = settings.tile_size, settings.min_tiles, settings.max_tiles
    return rule.count_tiles(rule.grids_for(widths, heights, *limits).prod(1), settings.thumbnail)


def cut_grid(
    pixels: Pixels,
    grid: tuple[int, int],
    settings: TilingSettings,
    *,
    extent: tuple[float, float] | None = None,
    resample: Resample = "pillow",
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Cut a picture into the tiles of a grid (columns, rows), row by row, the thumbnail last.

    Args:
        extent: (width, height) of the part of `pixels` that the picture fills, from its upper left
            corner; all of it if None. See `data_pipeline.decode`.
        out: the array to write into and return, uint8 [tiles of the grid, 3, tile_size, tile_size].
    """
    resized = resizer(pixels, extent, resample)
    return rule.cut_tiles(resized, grid, settings.tile_size, settings.thumbnail, out)


def resizer(
    pixels: Pixels, extent: tuple[float, float] | None, resample: Resample
) -> Callable[[int, int], np.ndarray]:
    """What gives a picture in a width and height, uint8 [3, height, width]; see `cut_grid`."""
    if isinstance(pixels, Image.Image) and pixels.mode != "RGB":
        raise ValueError(f"tiles are cut from RGB, got mode {pixels.mode}; convert it")
    return partial(_resize_torch if resample == "torch" else _resize_pillow, pixels, extent)


def as_image(pixels: Pixels) -> Image.Image:
    """A picture as Pillow's."""
    return pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)


def _resize_pillow(
    pixels: Pixels, extent: tuple[float, float] | None, width: int, height: int
) -> np.ndarray:
    """uint8 [3, height, width]."""
    return resize(as_image(pixels), width, height, None if extent is None else (0.0, 0.0, *extent))


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
