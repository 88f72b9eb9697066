"""Images -> the uint8 tiles that the vision tower takes, the same ones as in training."""

# First: it names the release that is needed, where the rest could not be imported.
from .releases_tokenflex import OLDEST  # noqa: F401  # isort: skip

from functools import partial
from typing import Any, TypedDict

import numpy as np
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from .picture_tokenflex import resize
from .source_tokenflex import load_rgb
from .tiling_tokenflex import check_tiling, cut_tiles, grid_for


class TokenFlexImagesKwargs(TypedDict, total=False):
    """Settings that one call may change; see `TokenFlexImageProcessor`."""

    tile_size: int
    min_tiles: int
    max_tiles: int
    thumbnail: bool
    input_data_format: str | None


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
        input_data_format: str | None = None,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Cut images into tiles; settings that are not given are the processor's own.

        images: one, a list, or a list of lists; each a `PIL.Image`, a file's path, bytes, an open
            file, a URL (http, https, file, data), base64, a row {"bytes", "path"} of `datasets`, or
            an array or tensor, [height, width], [height, width, channels] or channels first. One of
            four dimensions is several images. All give the pixels of the file: turned upright by
            its EXIF orientation (a `PIL.Image` that was turned by hand must not keep the tag),
            transparent parts white, 16-bit and floating-point greys scaled to 8 bit. Colours in
            floats are 0 to 1, or 0 to 255.
        input_data_format: "channels_first" or "channels_last" of arrays whose shape allows both.

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
            rgb = load_rgb(image, f"images[{i}]", input_data_format)
            grid = grid_for(*rgb.size, size, least, most)
            tiles.append(cut_tiles(partial(resize, rgb), grid, size, thumbnail))
        pixels = np.concatenate([np.empty((0, 3, size, size), np.uint8), *tiles])
        counts = np.array([len(part) for part in tiles], dtype=np.int64)
        return BatchFeature({"pixel_values": pixels, "num_tiles": counts}, return_tensors)

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Images as they are given: `preprocess` opens those that are paths or URLs."""
        return image_url_or_urls


def flatten(images: Any) -> list[Any]:
    """One image, an array of several, a list or a list of lists as a flat list."""
    if getattr(images, "ndim", 0) == 4:
        images = list(images)
    if not isinstance(images, list | tuple):
        return [images]
    return [image for entry in images for image in flatten(entry)]
