"""An image with the tiles it is cut into, and their tokens."""

from typing import Any

from PIL import Image, ImageDraw

from data_pipeline.processor.tiling_tokenflex import count_tiles, grid_for

_TILE_COLOUR, _TOKEN_COLOUR = (255, 90, 0), (0, 200, 255)
_SHOWN_PIXELS = 720  # longer side of the picture with the grid


def draw_token_grid(
    image: Image.Image, processor: Any, side: int, max_tiles: int | None = None
) -> tuple[Image.Image, int]:
    """A copy of an RGB image with its tiles and their token cells, and the number of tiles.

    The lines are where the cuts fall in the image itself; the thumbnail, one more tile of the whole
    image, has no lines. max_tiles: instead of the processor's.
    """
    settings = processor.image_processor
    most = settings.max_tiles if max_tiles is None else max_tiles
    columns, rows = grid_for(*image.size, settings.tile_size, settings.min_tiles, most)
    scale = _SHOWN_PIXELS / max(image.size)
    size = [max(1, round(length * scale)) for length in image.size]
    shown = image.resize((size[0], size[1]), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(shown)
    for step, colour, width in ((side, _TOKEN_COLOUR, 1), (1, _TILE_COLOUR, 3)):
        for i in range(columns * step + 1):
            x = min(size[0] - 1, round(i * size[0] / (columns * step)))
            draw.line([(x, 0), (x, size[1])], fill=colour, width=width)
        for i in range(rows * step + 1):
            y = min(size[1] - 1, round(i * size[1] / (rows * step)))
            draw.line([(0, y), (size[0], y)], fill=colour, width=width)
    return shown, count_tiles(columns * rows, settings.thumbnail)
