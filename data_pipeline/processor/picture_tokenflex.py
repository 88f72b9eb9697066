"""Image files of every usual kind -> a correct RGB picture."""

import struct
import zlib
from io import BytesIO
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image

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

# EXIF orientation -> what turns the stored picture upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPS_SIDES = (5, 6, 7, 8)
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_TEXT, _PNG_TEXTS = 1 << 20, 64 << 20
"""Bytes of one text or colour profile, and of all, above which Pillow refuses a whole PNG."""
_UNKNOWN_KIND = ("unsupported", "not supported", "unknown", "unrecognized", "cannot handle")
_ORIENTATION_SOURCES = ("exif", "xmp", "Raw profile type exif", "XML:com.adobe.xmp")


class PictureError(ValueError):
    """A picture that cannot be used; the message says why."""


def open_picture(file: BinaryIO, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An image file, opened and not yet decoded.

    Raises PictureError for what is not an image of a known format, has no pixels or more than
    `max_pixels`; nearly anything else, which `reason` puts into words, for damage.
    """
    try:
        image = Image.open(_without_large_texts(file), formats=FORMATS)
    except Image.UnidentifiedImageError as error:
        length = file.seek(0, 2)
        file.seek(0)
        raise PictureError(
            f"not an image, or its header is damaged: {length} bytes beginning with "
            f"{file.read(8)!r}; known formats are {', '.join(FORMATS)}"
        ) from error
    check_size(image.size, max_pixels)
    return image


def _without_large_texts(file: BinaryIO) -> BinaryIO:
    """The file from its beginning; a copy without them where texts of a PNG are too large."""
    start, total, dropped = len(_PNG), 0, []
    is_png = file.read(start) == _PNG
    while is_png and len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        end = start + length + 12
        if kind in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            size = _text_size(kind, file.read(length))
            total += size
            if size > _PNG_TEXT or total > _PNG_TEXTS:
                dropped.append(slice(start, end))
        start = file.seek(end)
    file.seek(0)
    if not dropped:
        return file
    data = bytearray(file.read())
    for chunk in reversed(dropped):
        del data[chunk]
    return BytesIO(data)


def _text_size(kind: bytes, chunk: bytes) -> int:
    """Bytes of a PNG's text or profile, unpacked as far as `_PNG_TEXT` and one more."""
    packed = chunk.partition(b"\0")[2]
    if kind == b"iTXt":  # flag and method, then language, keyword and text
        packed = packed[2:].split(b"\0", 2)[-1] if packed[:1] == b"\1" else b""
    else:
        packed = b"" if kind == b"tEXt" else packed[1:]
    try:
        unpacked = zlib.decompressobj().decompress(packed, _PNG_TEXT + 1)
    except zlib.error:
        return len(chunk)
    return max(len(chunk), len(unpacked))


def check_size(size: tuple[int, int], max_pixels: int = MAX_PIXELS) -> None:
    """PictureError for a (width, height) without pixels or with more than `max_pixels`."""
    width, height = size
    if width < 1 or height < 1:
        raise PictureError(f"the image has no pixels: {width} x {height}")
    if width * height > max_pixels:
        raise PictureError(_too_large(f"{width} x {height} pixels are", max_pixels))


def reason(error: Exception, max_pixels: int = MAX_PIXELS) -> str:
    """What is wrong with a picture whose opening or decoding raised this.

    On damaged files Pillow's decoders raise nearly anything: OSError, SyntaxError, struct.error,
    zlib.error, IndexError, ...
    """
    if isinstance(error, PictureError):
        return str(error)
    if isinstance(error, Image.DecompressionBombError):
        return _too_large(f"{error}, which is", max_pixels)
    if isinstance(error, OSError) and error.errno is not None:  # the file's, not Pillow's
        return str(error)
    what = str(error) or type(error).__name__
    if any(word in what.lower() for word in _UNKNOWN_KIND):
        return f"an image of a kind that Pillow does not decode: {what}; save it as PNG or JPEG"
    return f"damaged or truncated image file: {what}"


def upright_rgb(image: Image.Image) -> Image.Image:
    """Decode an opened image: RGB, upright according to its EXIF orientation.

    Transparent parts become white, 16-bit and floating-point greys are scaled to 8 bit, an
    animation gives its first frame. Colour profiles are not applied.
    """
    orientation = orientation_of(image)
    image.load()
    return turn(to_rgb(image), orientation)


def orientation_of(image: Image.Image) -> int:
    """EXIF orientation, 1 where there is none; asked before decoding, so all callers agree."""
    # Pillow turns TIFF files upright by itself, sizes included.
    if image.format == "TIFF":
        return 1
    try:
        # Not image.getexif(): for PNG that decodes the picture to look behind the pixels.
        found = int(Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1))
    except Exception:  # EXIF that makes no sense does not make the picture worthless
        return 1
    return found if found in _TURNS else 1


def upright(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """(width, height) after turning upright what is stored with this size; its own inverse."""
    return (size[1], size[0]) if orientation in _SWAPS_SIDES else size


def turn(image: Image.Image, orientation: int) -> Image.Image:
    """A decoded image turned upright, or itself."""
    if orientation == 1:
        return image
    turned = image.transpose(_TURNS[orientation])
    for key in _ORIENTATION_SOURCES:  # or another reader would turn the picture once more
        turned.info.pop(key, None)
    return turned


def to_rgb(image: Image.Image) -> Image.Image:
    """A decoded image of any mode as RGB, not turned; see `upright_rgb`."""
    if image.mode.startswith("I;16"):
        return _grey_to_rgb(np.asarray(image) / 257.0)
    if image.mode in ("I", "F"):
        return _grey_to_rgb(_scale_by_content(image))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def resize(
    image: Image.Image,
    width: int,
    height: int,
    box: tuple[float, float, float, float] | None = None,
) -> np.ndarray:
    """An RGB picture, or the box (left, top, right, bottom) of it, as uint8 [3, height, width]."""
    resized = image.resize((width, height), Image.Resampling.BICUBIC, box)
    return np.asarray(resized).transpose(2, 0, 1)


def _scale_by_content(image: Image.Image) -> np.ndarray:
    """Greys without a fixed range to 0 .. 255, float64 [height, width].

    The range is the smallest usual one that holds all values: 0..1 (floats), 0..255, 0..65535;
    values outside of these are stretched from minimum to maximum.
    """
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise PictureError("the image has pixels that are not finite numbers")
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 65535:
        return (values - low) * (255 / (high - low)) if high > low else np.zeros_like(values)
    if image.format == "PPM" or high > 255:  # Pillow scales every 16-bit PGM to 0..65535
        return values / 257
    return values * 255 if image.mode == "F" and high <= 1 else values


def _grey_to_rgb(grey: np.ndarray) -> Image.Image:
    return Image.fromarray(np.round(grey).astype(np.uint8)).convert("RGB")


def _too_large(what: str, max_pixels: int) -> str:
    return f"image too large: {what} more than the limit of {max_pixels} pixels; downscale it"
