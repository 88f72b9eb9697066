"""Pictures and tiles by Pillow alone: what the pipeline's own ways must equal."""

import numpy as np
from PIL import Image

from data_pipeline.images import open_image
from data_pipeline.processor.picture_tokenflex import MAX_PIXELS, upright_rgb
from data_pipeline.tiling import TilingSettings, cut_grid, grid_for


def decode_rgb(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An image file as an upright RGB picture."""
    with open_image(data, max_pixels) as image:
        return upright_rgb(image)


def cut_tiles(image: Image.Image, settings: TilingSettings) -> np.ndarray:
    """An RGB picture as uint8 [num_tiles, 3, tile_size, tile_size]."""
    return cut_grid(image, grid_for(*image.size, settings), settings)
