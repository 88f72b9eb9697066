"""Images -> the uint8 tiles that the vision tower takes, the same ones as in training."""

from functools import lru_cache
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from PIL import ExifTags, Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import load_image

# Pillow's own limit: about 256 MiB of RGB. Anything larger is taken for a decompression bomb.
MAX_PIXELS = 89_478_485

# Raster formats whose decoder is part of Pillow; EPS, say, would start Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")

# EXIF orientation -> what turns the stored picture upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class TokenFlexImagesKwargs(TypedDict, total=False):
    """Settings that one call may change; see `TokenFlexImageProcessor`."""

    tile_size: int
    min_tiles: int
    max_tiles: int
    thumbnail: bool


class TokenFlexImageProcessor(BaseImageProcessor):
    """Cuts images into square tiles; the model normalises them.

    The rule is InternVL's (arXiv 2404.16821, section 3.2): among all grids of min_tiles ..
    max_tiles tiles the one whose aspect ratio is closest, the image stretched to fill it.

    tile_size: side of a tile in pixels, the vision tower's image_size.
    min_tiles, max_tiles: of an image's grid, the thumbnail not counted.
    thumbnail: append the whole image as one more tile when the grid has more than one.
    """

    valid_kwargs = TokenFlexImagesKwargs  # type: ignore[assignment]
    model_input_names = ["pixel_values"]  # noqa: RUF012 - transformers' own style

    def __init__(
        self,
        tile_size: int = 384,
        min_tiles: int = 1,
        max_tiles: int = 1,
        thumbnail: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.tile_size, self.min_tiles, self.max_tiles = tile_size, min_tiles, max_tiles
        self.thumbnail = thumbnail
        _check_tiling(tile_size, min_tiles, max_tiles)

    def preprocess(
        self,
        images: Any,
        tile_size: int | None = None,
        min_tiles: int | None = None,
        max_tiles: int | None = None,
        thumbnail: bool | None = None,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Cut images into tiles; settings that are not given are the processor's own.

        images: one, a list, or a list of lists; each a `PIL.Image`, a file's path, a URL, a base64
            string, or a uint8 array or tensor, [height, width], [height, width, channels] or
            channels first. A file or `PIL.Image` is turned upright by its EXIF orientation (one
            that was turned by hand must not keep the tag), transparent parts become white and
            16-bit and floating-point greys are scaled to 8 bit. URLs and base64 strings are opened
            by transformers, which drops transparency and extra bits.

        Returns pixel_values, uint8 [T, 3, tile_size, tile_size], image after image, each row by
        row, a thumbnail last; and num_tiles, int64 per image.

        Raises ValueError, naming the image, for anything that is not one, and for settings out of
        range.
        """
        if kwargs:
            raise ValueError(f"unexpected arguments: {', '.join(sorted(kwargs))}")
        size = self.tile_size if tile_size is None else tile_size
        least = self.min_tiles if min_tiles is None else min_tiles
        most = self.max_tiles if max_tiles is None else max_tiles
        thumbnail = self.thumbnail if thumbnail is None else thumbnail
        _check_tiling(size, least, most)
        tiles = [
            cut_tiles(rgb, size, least, most, thumbnail)
            for rgb in (to_rgb(image, f"images[{i}]") for i, image in enumerate(flatten(images)))
        ]
        pixels = np.concatenate([np.empty((0, 3, size, size), np.uint8), *tiles])
        counts = np.array([len(part) for part in tiles], dtype=np.int64)
        return BatchFeature({"pixel_values": pixels, "num_tiles": counts}, return_tensors)

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Images as they are given: `preprocess` opens those that are paths or URLs."""
        return image_url_or_urls


def flatten(images: Any) -> list[Any]:
    """One image, a list or a list of lists as a flat list."""
    if not isinstance(images, list | tuple):
        return [images]
    return [image for entry in images for image in flatten(entry)]


def to_rgb(image: Any, name: str) -> Image.Image:
    """Anything that `preprocess` takes as an upright RGB picture; `name` is for messages."""
    try:
        opened = _open(image)
        width, height = opened.size
        if width < 1 or height < 1 or width * height > MAX_PIXELS:
            raise ValueError(f"it has {width} x {height} pixels; give 1 to {MAX_PIXELS} in all")
        orientation = _orientation(opened)
        opened.load()
        rgb = _convert(opened)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        shown = _shorten(image) if isinstance(image, str) else f"of type {type(image).__name__}"
        raise ValueError(
            f"{name} is {shown} and cannot be used as an image: {str(error) or repr(error)}"
        ) from error
    return rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb


def _shorten(text: str) -> str:
    """A path, URL or encoded picture for a message: its end names the file."""
    return repr(text) if len(text) <= 200 else f"{text[:60]!r} ... {text[-60:]!r}"


def cut_tiles(
    image: Image.Image, size: int, min_tiles: int, max_tiles: int, thumbnail: bool
) -> np.ndarray:
    """Cut an RGB image into tiles, row by row, the thumbnail last: uint8 [tiles, 3, size, size]."""
    columns, rows = grid_for(*image.size, size, min_tiles, max_tiles)
    pixels = _resize(image, columns * size, rows * size)  # [rows * size, columns * size, 3]
    cells = pixels.reshape(rows, size, columns, size, 3).transpose(0, 2, 4, 1, 3)
    tiles = cells.reshape(rows * columns, 3, size, size)
    if not thumbnail or rows * columns == 1:
        return tiles
    return np.concatenate([tiles, _resize(image, size, size).transpose(2, 0, 1)[None]])


def grid_for(width: int, height: int, size: int, min_tiles: int, max_tiles: int) -> tuple[int, int]:
    """(columns, rows) of the grid for an image of this size in pixels.

    Among grids that are equally close, a larger one is taken if the image has more than half as
    many pixels as it.
    """
    best, best_difference = (1, 1), float("inf")
    for columns, rows in _candidate_grids(min_tiles, max_tiles):
        difference = abs(width / height - columns / rows)
        larger = difference == best_difference and width * height > 0.5 * size**2 * columns * rows
        if difference < best_difference or larger:
            best, best_difference = (columns, rows), difference
    return best


@lru_cache(maxsize=64)
def _candidate_grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """All (columns, rows) with min_tiles <= columns * rows <= max_tiles, fewest tiles first."""
    sides = range(1, max_tiles + 1)
    grids = [(i, j) for i in sides for j in sides if min_tiles <= i * j <= max_tiles]
    return tuple(sorted(grids, key=lambda grid: (grid[0] * grid[1], grid)))


def _resize(image: Image.Image, width: int, height: int) -> np.ndarray:
    """uint8 [height, width, 3]."""
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def _check_tiling(tile_size: int, min_tiles: int, max_tiles: int) -> None:
    if tile_size < 1:
        raise ValueError(f"tile_size is {tile_size}; give the vision tower's image_size")
    if not 1 <= min_tiles <= max_tiles:
        raise ValueError(
            f"min_tiles is {min_tiles} and max_tiles {max_tiles}; both must be at least 1, and "
            "max_tiles the larger"
        )


def _open(image: Any) -> Image.Image:
    """The image, not yet decoded where it is a file."""
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, Path) or (isinstance(image, str) and _is_file(image)):
        return Image.open(image, formats=[name for name in FORMATS if name in _known_formats()])
    if isinstance(image, str):
        return load_image(image)
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu().numpy()
    if not isinstance(image, np.ndarray):
        raise ValueError("give a PIL.Image, a path, a URL or a uint8 array")
    if image.dtype != np.uint8 or image.ndim not in (2, 3):
        raise ValueError(
            f"the array is {image.dtype} {image.shape}; give uint8, [height, width, 3] or "
            "[3, height, width]"
        )
    if image.ndim == 3 and image.shape[2] not in (1, 3, 4):
        image = image.transpose(1, 2, 0)
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[..., 0]
    return Image.fromarray(np.ascontiguousarray(image))


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # too long for a path, or with a zero byte: base64, say
        return False


@lru_cache(maxsize=1)
def _known_formats() -> frozenset[str]:
    Image.init()
    return frozenset(Image.OPEN)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 where there is none."""
    # Pillow turns TIFF files upright by itself, sizes included.
    if image.format == "TIFF":
        return 1
    try:
        # Not image.getexif(): for PNG that decodes the picture to look behind the pixels.
        return int(Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1))
    except Exception:  # EXIF that makes no sense does not make the picture worthless
        return 1


def _convert(image: Image.Image) -> Image.Image:
    """A decoded image of any mode as RGB, transparent parts white."""
    if image.mode.startswith("I;16"):
        return _grey_to_rgb(np.asarray(image) / 257.0)
    if image.mode in ("I", "F"):
        return _grey_to_rgb(_scale_by_content(image))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _scale_by_content(image: Image.Image) -> np.ndarray:
    """Greys without a fixed range to 0 .. 255: the smallest of 0..1, 0..255, 0..65535 that holds
    all values, else stretched from minimum to maximum; float64 [height, width].
    """
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it has pixels that are not finite numbers")
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 65535:
        return (values - low) * (255 / (high - low)) if high > low else np.zeros_like(values)
    if image.format == "PPM" or high > 255:  # Pillow scales every 16-bit PGM to 0..65535
        return values / 257
    return values * 255 if image.mode == "F" and high <= 1 else values


def _grey_to_rgb(grey: np.ndarray) -> Image.Image:
    return Image.fromarray(np.round(grey).astype(np.uint8)).convert("RGB")
