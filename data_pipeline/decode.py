"""Image files as bytes -> the tiles that the vision encoder takes.

Nearly every image of a training set is a JPEG. Those are decoded by libjpeg-turbo (the package
simplejpeg) to the very pixels that Pillow gives, only faster, and refused where it warns of damage
that Pillow keeps to itself. A large photograph is decoded at 1/2, 1/4 or 1/8 of its size: the
inverse DCT leaves out the frequencies that tiles could not show. Pillow does the rest: other
formats, CMYK, and all of it where simplejpeg is not installed.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, JpegImagePlugin

from data_pipeline.errors import InputError
from data_pipeline.images import open_image
from data_pipeline.processor.native_shapes_tokenflex import cut_patches
from data_pipeline.processor.picture_tokenflex import orientation_of, to_rgb, turn, upright
from data_pipeline.tiling import (
    Pixels,
    Resample,
    TilingSettings,
    as_image,
    cut_grid,
    grid_for,
    resizer,
)

try:
    import simplejpeg
except ImportError:  # optional: the pixels are the same
    simplejpeg = None

# A reduced picture must be so many times as wide and high as the tiles that are cut from it. On
# real photographs the tiles then differ from those of the full decode by 0.7 to 2.2 of 255 on
# average; at 1.0 by 0.8 to 3.1, at 1.5 by 0.5 to 1.5, at 2.0 by 0.4 to 0.9.
MIN_OVERSIZE = 1.25

# What libjpeg-turbo calls damaged; whatever else it refuses, Pillow may know.
_DAMAGE = ("Corrupt JPEG data", "Premature end of JPEG")


def image_tiles(
    data: bytes,
    size: tuple[int, int] | None,
    tiling: TilingSettings,
    reduced: bool = True,
    *,
    resample: Resample = "pillow",
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Decode an image file and cut it into tiles; see `upright_rgb` for what becomes of its pixels.

    With neither `reduced` nor torch's resampling the result is that of Pillow alone, bit for bit.

    Args:
        data: the whole file.
        size: (width, height) that the upright image must have, None for any.
        reduced: decode large JPEGs at a fraction of their size, see `MIN_OVERSIZE`.
        resample: what resizes.
        out: the array to write into and return.

    Returns:
        uint8 [num_tiles(*size, tiling), 3, tile_size, tile_size].

    Raises:
        InputError: as `open_image`, or the image has another size, or libjpeg-turbo warns of
            damage.
    """
    side = tiling.tile_size

    def of_grid(width: int, height: int) -> tuple[int, int]:
        columns, rows = grid_for(width, height, tiling)
        return columns * side, rows * side

    pixels, extent, (width, height) = _upright_pixels(data, size, of_grid, reduced)
    grid = width // side, height // side
    return cut_grid(pixels, grid, tiling, extent=extent, resample=resample, out=out)


def image_patches(
    data: bytes,
    size: tuple[int, int] | None,
    grid: tuple[int, int],
    patch_size: int,
    reduced: bool = True,
    *,
    resample: Resample = "pillow",
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Decode an image file into the patches (rows, columns) of a grid, the image stretched to it.

    Arguments and errors as those of `image_tiles`. Returns uint8 [rows * columns, patch_size^2 * 3]
    as `cut_patches` does.
    """
    wanted = grid[1] * patch_size, grid[0] * patch_size
    pixels, extent, _ = _upright_pixels(data, size, lambda *_: wanted, reduced)
    return cut_patches(resizer(pixels, extent, resample)(*wanted), patch_size, out)


def _upright_pixels(
    data: bytes,
    size: tuple[int, int] | None,
    wanted_for: Callable[[int, int], tuple[int, int]],
    reduced: bool,
) -> tuple[Pixels, tuple[float, float] | None, tuple[int, int]]:
    """A picture, the part of it that the image fills (None: all), the size to bring it to.

    wanted_for: that size of an image of this width and height, both in pixels.
    """
    with open_image(data) as image:
        orientation = orientation_of(image)
        found = upright(image.size, orientation)
        if size is not None and found != tuple(size):
            raise InputError(
                f"an image of {found[0]} x {found[1]} pixels where the index has "
                f"{size[0]} x {size[1]}: the index does not match the shard; run "
                "python -m data_pipeline.index again"
            )
        wanted = wanted_for(*found)
        factor = _reduction(image, orientation, wanted) if reduced else 1
        stored = image.size
        pixels: Pixels | None = _decode_turbo(data, image, factor)
        if pixels is None:
            if factor > 1:
                image.draft(None, (stored[0] // factor, stored[1] // factor))
            image.load()
            pixels = to_rgb(image)
        if orientation != 1:
            pixels = turn(as_image(pixels), orientation)
    # A reduced picture is rounded up to whole pixels, which the image does not quite fill.
    extent = None if factor == 1 else (found[0] / factor, found[1] / factor)
    return pixels, extent, wanted


def check_decodes(data: bytes) -> None:
    """InputError unless an image file decodes whole; what training would find out later."""
    with open_image(data) as image:
        if _decode_turbo(data, image, 1) is None:
            image.load()
            to_rgb(image)


def _reduction(image: Image.Image, orientation: int, wanted: tuple[int, int]) -> int:
    """The largest usable divisor of the size: 1, 2, 4 or 8."""
    if not isinstance(image, JpegImagePlugin.JpegImageFile):
        return 1
    # Neither side of the image may fall below this, as it is stored.
    across, down = upright(wanted, orientation)
    width, height = image.size
    for factor in (8, 4, 2):
        # Turned, the pixels that are not quite filled would lie at another side.
        turned = orientation != 1 and (width % factor or height % factor)
        oversize = factor * MIN_OVERSIZE
        if width >= oversize * across and height >= oversize * down and not turned:
            return factor
    return 1


def _decode_turbo(data: bytes, image: Image.Image, factor: int) -> np.ndarray | None:
    """uint8 [height, width, 3] of a JPEG at 1/factor of its size; None if Pillow has to do it.

    Pillow's own conversion from CMYK differs by 1 of 255, so that one stays Pillow's.
    """
    jpeg = isinstance(image, JpegImagePlugin.JpegImageFile) and image.mode in ("RGB", "L")
    if simplejpeg is None or not jpeg:
        return None
    width, height = (-(-side // factor) for side in image.size)
    try:
        pixels: np.ndarray = simplejpeg.decode_jpeg(
            data, "RGB", min_width=width, min_height=height, strict=True
        )
    except ValueError as error:
        if str(error).startswith(_DAMAGE):
            raise InputError(f"damaged or truncated image file: {error}") from error
        return None
    return pixels if pixels.shape == (height, width, 3) else None
