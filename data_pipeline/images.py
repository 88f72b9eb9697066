"""Image files as bytes -> their size from the header, or a correct RGB picture."""

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO

import numpy as np
from PIL import ExifTags, Image

from data_pipeline.errors import InputError

# Pillow's own limit: about 256 MiB of RGB. Anything larger is taken for a decompression bomb.
MAX_PIXELS = 89_478_485

# Raster formats whose decoder is part of Pillow and notices a truncated file. Others stay out: EPS
# would start Ghostscript on untrusted bytes, and some formats have no signature to be known by.
Image.init()
FORMATS = tuple(
    name
    for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
    if name in Image.OPEN
)

# File name endings of these formats, lower case: the one list for every reader.
IMAGE_SUFFIXES = frozenset(
    {ending for ending, name in Image.registered_extensions().items() if name in FORMATS}
    | ({".mpo"} if "MPO" in Image.OPEN else set())
)

# EXIF orientation -> what turns the stored picture upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION_SOURCES = ("exif", "xmp", "Raw profile type exif", "XML:com.adobe.xmp")
_SWAPS_SIDES = (5, 6, 7, 8)


def has_image_suffix(name: str) -> bool:
    """Whether a file's name ends as those of a format that is read, in any case."""
    return f".{name.rpartition('.')[2].lower()}" in IMAGE_SUFFIXES


def image_size(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) in pixels as `decode_rgb` will return them; reads the header only.

    Raises:
        InputError: not an image of a known format, or more than `max_pixels` pixels.
    """
    with open_image(data, max_pixels) as image:
        return upright(image.size, orientation_of(image))


def decode_rgb(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image file into RGB, upright according to its EXIF orientation.

    Transparent parts become white, 16-bit and floating-point greys are scaled to 8 bit, an
    animation gives its first frame. Colour profiles are not applied.

    Args:
        data: the whole file.
        max_pixels: checked before decoding; Pillow in addition refuses twice its own
            `Image.MAX_IMAGE_PIXELS`.

    Raises:
        InputError: as `image_size`, or the file is truncated or damaged. The caller knows where
            the bytes came from and adds it.
    """
    with open_image(data, max_pixels) as image:
        orientation = orientation_of(image)
        image.load()
        rgb = to_rgb(image)
        if orientation in UPRIGHT:
            rgb = rgb.transpose(UPRIGHT[orientation])
            for key in _ORIENTATION_SOURCES:  # or another reader would turn the picture once more
                rgb.info.pop(key, None)
        return rgb


@contextmanager
def open_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """The opened, not yet decoded image; whatever goes wrong in the block is an `InputError`."""
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width < 1 or height < 1:
                raise InputError(f"the image has no pixels: {width} x {height}")
            if width * height > max_pixels:
                raise InputError(_too_large(f"{width} x {height} pixels are", max_pixels))
            yield image
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(_too_large(f"{error}, which is", max_pixels)) from error
    except Image.UnidentifiedImageError as error:
        raise InputError(
            f"not an image, or its header is damaged: {len(data)} bytes beginning with "
            f"{data[:8]!r}; known formats are {', '.join(FORMATS)}"
        ) from error
    # On damaged files Pillow's decoders raise nearly anything: OSError, SyntaxError, struct.error,
    # zlib.error, IndexError, ...
    except Exception as error:
        what = str(error) or type(error).__name__
        raise InputError(f"damaged or truncated image file: {what}") from error


def _too_large(what: str, max_pixels: int) -> str:
    return f"image too large: {what} more than the limit of {max_pixels} pixels; downscale it"


def upright(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """(width, height) after turning upright what is stored with this size; its own inverse."""
    return (size[1], size[0]) if orientation in _SWAPS_SIDES else size


def orientation_of(image: Image.Image) -> int:
    """EXIF orientation, 1 where there is none; asked before decoding, so all callers agree."""
    # Pillow turns TIFF files upright by itself, sizes included.
    if image.format == "TIFF":
        return 1
    try:
        # Not image.getexif(): for PNG that decodes the picture to look behind the pixels.
        return int(Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1))
    except Exception:  # EXIF that makes no sense does not make the picture worthless
        return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """A decoded image of any mode as RGB, not turned; see `decode_rgb`."""
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
    """Greys without a fixed range to 0 .. 255, float64 [height, width].

    The range is the smallest usual one that holds all values: 0..1 (floats), 0..255, 0..65535;
    values outside of these are stretched from minimum to maximum.
    """
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise InputError("the image has pixels that are not finite numbers")
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 65535:
        return (values - low) * (255 / (high - low)) if high > low else np.zeros_like(values)
    if image.format == "PPM" or high > 255:  # Pillow scales every 16-bit PGM to 0..65535
        return values / 257
    return values * 255 if image.mode == "F" and high <= 1 else values


def _grey_to_rgb(grey: np.ndarray) -> Image.Image:
    return Image.fromarray(np.round(grey).astype(np.uint8)).convert("RGB")
