"""Where the pictures that records name are: beside them, inside them, or nowhere to be had."""

import base64
import binascii
import os
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from data_pipeline.errors import InputError
from data_pipeline.images import open_image

_SHORTEST_BASE64 = 64
_BASE64_STARTS = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "Qk", "SUkq", "TU0A", "AAAA")
"""How JPEG, PNG, GIF, WebP, BMP, TIFF, AVIF begin in base64."""
_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "JPEG2000": "jp2"}


def find_picture(source: Any, folder: Path | None) -> Path | bytes:
    """The file, or its bytes, of a picture that a record names.

    Args:
        source: bytes; a path, relative to `folder` or absolute inside it; a data: URI; or base64.
        folder: of the pictures; links inside it may lead elsewhere. None: there is none.

    Raises:
        InputError: a URL, a path that leads out of the folder or has none, a broken data: URI.
    """
    if isinstance(source, bytes):
        return source
    name = str(source)
    if name.startswith("data:"):
        return _decode(name)
    if (data := _plain_base64(name)) is not None:
        return data
    if "://" in name and not name.startswith("file://"):
        raise InputError(
            f"the image {name[:80]!r} is a URL; download it (img2dataset does) and name the file"
        )
    if folder is None:
        raise InputError(f"the image {name[:80]!r} is a path; name its folder with --images")
    if name.startswith("file://"):
        name = unquote(name.removeprefix("file://").removeprefix("localhost"))
    path = _inside(name, folder)
    if "\\" in name and not path.is_file():  # written on Windows
        path = _inside(name.replace("\\", "/"), folder)
    return path


def member_suffix(number: int, picture: Path | bytes) -> str:
    """Name of the tar member for a sample's image `number`: "0.jpg" for photo.JPG.

    InputError for bytes that are no image.
    """
    if isinstance(picture, bytes):
        with open_image(picture) as image:
            kind = image.format or "image"
        return f"{number}.{_EXTENSIONS.get(kind, kind.lower())}"
    extension = picture.suffix[1:].lower()
    usable = extension.isascii() and extension.isalnum() and len(extension) <= 8
    return f"{number}.{extension if usable else 'image'}"


def _inside(name: str, folder: Path) -> Path:
    """The path, without "..", of a name that must lie in the folder, or where it links to."""
    for absolute in (os.path.abspath, os.path.realpath):
        root = absolute(folder)
        path = os.path.normpath(os.path.join(root, name))  # noqa: PTH118
        if f"{path}/".startswith(f"{root.rstrip('/')}/"):
            return Path(path)
    raise InputError(
        f"the image {name[:200]!r} leads out of the image folder {folder}; name the folder that "
        "holds it with --images"
    )


def _decode(uri: str) -> bytes:
    head, _, data = uri.partition(",")
    if not head.endswith(";base64"):
        raise InputError(f"the image {uri[:40]!r} is a data: URI without base64")
    try:
        return base64.b64decode("".join(data.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"the image {uri[:40]!r} is no base64: {error}") from error


def _plain_base64(text: str) -> bytes | None:
    """The picture that a text is in base64, as tables hold it; None for any other text."""
    if len(text) < _SHORTEST_BASE64 or "." in text or not text.startswith(_BASE64_STARTS):
        return None
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError:
        return None
