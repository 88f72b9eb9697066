"""Images -> the uint8 tiles that the vision tower takes, the same ones as in training."""

from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import load_image

from .picture_tokenflex import (
    PictureError,
    check_size,
    open_picture,
    reason,
    resize,
    upright_rgb,
)
from .tiling_tokenflex import check_tiling, cut_tiles, grid_for


class TokenFlexImagesKwargs(TypedDict, total=False):
    """Settings that one call may change; see `TokenFlexImageProcessor`."""

    tile_size: int
    min_tiles: int
    max_tiles: int
    thumbnail: bool


class TokenFlexImageProcessor(BaseImageProcessor):
    """Cuts images into square tiles; the model normalises them.

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
        check_tiling(tile_size, min_tiles, max_tiles)

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
        check_tiling(size, least, most)
        tiles = []
        for i, image in enumerate(flatten(images)):
            rgb = load_rgb(image, f"images[{i}]")
            grid = grid_for(*rgb.size, size, least, most)
            tiles.append(cut_tiles(partial(resize, rgb), grid, size, thumbnail))
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


def load_rgb(image: Any, name: str) -> Image.Image:
    """Anything that `preprocess` takes as an upright RGB picture; `name` is for messages."""
    try:
        if isinstance(image, Path) or (isinstance(image, str) and _is_file(image)):
            with Path(image).open("rb") as file:
                return upright_rgb(open_picture(file))
        given = _as_image(image)
        check_size(given.size)
        return upright_rgb(given)
    except MemoryError:
        raise
    except Exception as error:
        shown = _shorten(image) if isinstance(image, str) else f"of type {type(image).__name__}"
        raise ValueError(
            f"{name} is {shown} and cannot be used as an image: {reason(error)}"
        ) from error


def _shorten(text: str) -> str:
    """A path, URL or encoded picture for a message: its end names the file."""
    return repr(text) if len(text) <= 200 else f"{text[:60]!r} ... {text[-60:]!r}"


def _as_image(image: Any) -> Image.Image:
    """What is no file here as Pillow's picture."""
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, str):
        try:
            return load_image(image)
        except Exception as error:
            raise PictureError(str(error) or repr(error)) from error
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu().numpy()
    if not isinstance(image, np.ndarray):
        raise PictureError("give a PIL.Image, a path, a URL or a uint8 array")
    if image.dtype != np.uint8 or image.ndim not in (2, 3):
        raise PictureError(
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
