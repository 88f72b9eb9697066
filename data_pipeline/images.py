"""Image files as bytes -> their size from the header, or an opened picture.

What goes wrong is an `InputError` that says why; the caller knows where the bytes came from and
adds it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from io import BytesIO

from PIL import Image

from data_pipeline.errors import InputError
from data_pipeline.files import LFS_POINTER
from data_pipeline.processor.picture_tokenflex import (
    FORMATS,
    MAX_PIXELS,
    open_picture,
    orientation_of,
    reason,
    upright,
)

# File name endings of these formats, lower case: the one list for every reader.
IMAGE_SUFFIXES = frozenset(
    {ending for ending, name in Image.registered_extensions().items() if name in FORMATS}
    | ({".mpo"} if "MPO" in Image.OPEN else set())
)


@lru_cache(maxsize=4096)  # asked of every member of a shard: the same few
def has_image_suffix(name: str) -> bool:
    """Whether a file's name ends as those of a format that is read, in any case."""
    return f".{name.rpartition('.')[2].lower()}" in IMAGE_SUFFIXES


def image_size(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels of the upright picture; reads the header only.

    Raises:
        InputError: not an image of a known format, or more than `MAX_PIXELS` pixels.
    """
    with open_image(data) as image:
        return upright(image.size, orientation_of(image))


@contextmanager
def open_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """The opened, not yet decoded image; whatever goes wrong in the block is an `InputError`."""
    if data.startswith(LFS_POINTER):
        raise InputError("a pointer of Git LFS, no image; fetch the file itself: git lfs pull")
    try:
        with open_picture(BytesIO(data), max_pixels) as image:
            yield image
    except InputError:
        raise
    except Exception as error:
        raise InputError(reason(error, max_pixels)) from error
