"""An image in any form that a caller has it -> the picture that its file gives."""

import os
from base64 import b64decode
from collections.abc import Mapping
from http.client import HTTPException
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, unquote, unquote_to_bytes
from urllib.request import Request, urlopen

import numpy as np
from PIL import Image

from .picture_tokenflex import (
    FORMATS,
    PictureError,
    check_size,
    open_picture,
    reason,
    upright_rgb,
)

_TIMEOUT_S = 30.0
_CHANNELS = (1, 2, 3, 4)  # grey, grey and alpha, RGB, RGBA
_OVERSHOOT = 1e-3  # of floats in 0 .. 1, as interpolation leaves it
_LONGEST_PATH = 4096
_FORMS = "a PIL.Image, a path, a URL, a data URI, base64, bytes, an array or a tensor"


def load_rgb(image: Any, name: str, channels: str | None = None) -> Image.Image:
    """Any form of an image as an upright RGB picture.

    image: see `TokenFlexImageProcessor.preprocess`. name: for messages. channels: of an array,
        "channels_first" or "channels_last"; by its shape where it is not given.

    Raises ValueError, which never repeats the data.
    """
    try:
        if isinstance(image, Image.Image):
            check_size(image.size)
            return upright_rgb(image)
        if hasattr(image, "__array__"):
            return upright_rgb(_picture_of(_as_array(image), channels))
        with _open_file(image) as file:
            return upright_rgb(open_picture(file))
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(
            f"{name} is {_named(image)} and cannot be used as an image: {reason(error)}"
        ) from error


def _named(image: Any) -> str:
    """A path or URL for a message, its end names the file; the kind of anything else."""
    if not isinstance(image, str | os.PathLike):
        return f"of type {type(image).__name__}"
    text = str(image)
    scheme = _scheme(text)
    if scheme == "data":
        return f"a data URI of {len(text)} characters, {text[:60].partition(',')[0]!r}"
    if len(text) > _LONGEST_PATH:
        return f"a string of {len(text)} characters beginning with {text[:20]!r}"
    if scheme in ("http", "https"):  # what is behind "?" or before "@" may be a secret
        place = text.partition("?")[0].partition("//")[2]
        text = f"{scheme}://{place.rpartition('@')[2]}"
    return repr(text) if len(text) <= 200 else f"{text[:60]!r} ... {text[-60:]!r}"


def _scheme(text: str) -> str:
    return text[:8].partition(":")[0].lower() if ":" in text[:8] else ""


def _open_file(source: Any) -> BinaryIO:
    """The file behind anything that is no picture and no array."""
    if isinstance(source, Mapping):  # a row of `datasets` that was not decoded
        source = source.get("bytes") or source.get("path")
    if isinstance(source, bytes | bytearray | memoryview):
        return BytesIO(source)
    if isinstance(source, os.PathLike):
        return Path(source).open("rb")
    if hasattr(source, "read"):
        return BytesIO(source.read())
    if not isinstance(source, str):
        raise PictureError(f"give {_FORMS}")
    scheme = _scheme(source)
    if scheme == "data":
        return BytesIO(_of_data_uri(source))
    if scheme in ("http", "https"):
        return BytesIO(_fetched(source))
    if scheme == "file":
        return _local(source).open("rb")
    return Path(source).open("rb") if _is_file(source) else BytesIO(_of_base64(source))


def _of_data_uri(uri: str) -> bytes:
    head, comma, body = uri.partition(",")
    if not comma:
        raise PictureError("a data URI has a comma before its data")
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(body)
    data = _decoded(unquote(body))
    if data is None:
        raise PictureError("its base64 is damaged")
    return data


def _of_base64(text: str) -> bytes:
    data = _decoded(text)
    try:  # many a path is base64, too
        Image.open(BytesIO(data or b""), formats=FORMATS)
    except Image.UnidentifiedImageError as error:
        raise PictureError(
            "there is no such file, and it is no URL, data URI or base64 of an image"
        ) from error
    except Exception:  # as the caller will find
        pass
    return data or b""


def _decoded(base64: str) -> bytes | None:
    """The bytes of base64 in either alphabet, with or without line ends and padding."""
    packed = "".join(base64.split()).replace("-", "+").replace("_", "/").rstrip("=")
    try:
        return b64decode(packed + "=" * (-len(packed) % 4), validate=True)
    except ValueError:
        return None


def _fetched(url: str) -> bytes:
    ascii_only = quote(url, safe="%/:=&?~#+!$,;'@()*[]")
    try:  # many a server refuses Python's own agent
        request = Request(ascii_only, headers={"User-Agent": "Mozilla/5.0 (tokenflex)"})
        with urlopen(request, timeout=_TIMEOUT_S) as answer:
            return bytes(answer.read())
    except (OSError, HTTPException) as error:
        code = getattr(error, "code", "")
        why = f"{code} {getattr(error, 'reason', error)!s:.200}".strip()
        raise PictureError(f"the request failed: {why}") from error


def _local(url: str) -> Path:
    host, slash, path = url[5:].removeprefix("//").partition("/")
    if url[5:7] != "//" or host not in ("", "localhost"):
        raise PictureError("a file's URL is file:///, then its whole path")
    return Path(unquote(slash + path))


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # too long for a path, or with a zero byte: base64, say
        return False


def _as_array(image: Any) -> np.ndarray:
    if hasattr(image, "detach"):  # a tensor of torch; numpy has no bfloat16
        image = image.detach().cpu()
        image = image.float() if image.is_floating_point() else image
    return np.asarray(image)


def _picture_of(array: np.ndarray, channels: str | None) -> Image.Image:
    """An array as Pillow's picture, of the mode that its file has."""
    if array.ndim not in (2, 3) or array.dtype.kind not in "buif":
        raise PictureError(
            f"the array is {array.dtype} {array.shape}; give numbers [height, width], "
            "[height, width, 3] or [3, height, width]"
        )
    if array.ndim == 3:
        array = _channels_last(array, channels)
    check_size((array.shape[1], array.shape[0]))
    pixels = _grey(array) if array.ndim == 2 else _colour(array)
    return Image.fromarray(np.ascontiguousarray(pixels))


def _channels_last(array: np.ndarray, channels: str | None) -> np.ndarray:
    """[height, width, channels], or [height, width] of a single one."""
    fits = {
        "channels_first": array.shape[0] in _CHANNELS,
        "channels_last": array.shape[2] in _CHANNELS,
    }
    if channels is None and all(fits.values()):
        raise PictureError(
            f"the array is {array.shape}, which may be channels first or last; say "
            "input_data_format='channels_first' or 'channels_last', or give a PIL.Image"
        )
    order = channels or max(fits, key=lambda order: fits[order])
    if not fits.get(order):
        raise PictureError(
            f"the array is {array.shape}, without 1 to 4 channels "
            f"{f'for input_data_format={channels!r}' if channels else 'first or last'}; give "
            "[height, width, 3] or [3, height, width]"
        )
    if order == "channels_first":
        array = array.transpose(1, 2, 0)
    return array[..., 0] if array.shape[2] == 1 else array


def _grey(array: np.ndarray) -> np.ndarray:
    """Greys as a file stores them; `to_rgb` scales what has more than 8 bit."""
    if array.dtype.kind == "f":
        return array.astype(np.float32)
    return array if array.dtype in (np.bool_, np.uint8, np.uint16) else array.astype(np.int32)


def _colour(array: np.ndarray) -> np.ndarray:
    """Colours as uint8: 16 bit lose the lower half as in Pillow, floats are 0 .. 1 or 0 .. 255."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array * np.uint8(255)
    if array.dtype == np.uint16:
        return (array >> 8).astype(np.uint8)
    low, high = float(array.min()), float(array.max())
    if array.dtype.kind == "f" and low >= -_OVERSHOOT and high <= 1 + _OVERSHOOT:
        return np.round(array.clip(0, 1) * 255.0).astype(np.uint8)
    if not (low >= 0 and high <= 255):
        raise PictureError(
            f"the array's {array.dtype} values are {low:g} to {high:g}; give 0 to 255, or floats "
            "from 0 to 1, without normalisation"
        )
    return np.round(array).astype(np.uint8)
