"""The page: image, question, a slider over the token counts; the image with its token grid."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from data_pipeline.errors import InputError
from data_pipeline.processor.prompt_tokenflex import IMAGE as PLACEHOLDER
from data_pipeline.processor.source_tokenflex import load_rgb
from data_pipeline.processor.tiling_tokenflex import count_tiles, grid_for
from training.generate import LoadedModel, generate_answer
from training.generate.answer import prepare_messages, stats_line
from training.generate.conversation import user_message

_TILE_COLOUR, _TOKEN_COLOUR = (255, 90, 0), (0, 200, 255)
_SHOWN_PIXELS = 720  # longer side of the picture with the grid


def build_page(gradio: Any, loaded: LoadedModel, max_new_tokens: int = 256) -> Any:
    """The page as Gradio's Blocks.

    A file stays a file until this module opens it, so that what is not an image is refused here, by
    the rules of the processor.
    """
    counts = [n * n for n in range(1, loaded.patches_per_side + 1)]
    default = counts.index(int(loaded.processor.num_image_tokens)) + 1
    answer, grid = _callbacks(gradio, loaded, max_new_tokens)
    with gradio.Blocks(title="TokenFLEX", analytics_enabled=False) as page:
        gradio.Markdown(f"## {Path(loaded.source).name}: any number of vision tokens")
        with gradio.Row():
            with gradio.Column():
                file = gradio.File(
                    label="Image", file_count="single", type="filepath", elem_id="file"
                )
                question = gradio.Textbox(label="Question", elem_id="question")
                side = gradio.Slider(
                    1,
                    loaded.patches_per_side,
                    value=default,
                    step=1,
                    label="n: each tile becomes n x n vision tokens",
                    elem_id="side",
                )
                ask = gradio.Button("Ask", variant="primary", elem_id="ask")
            with gradio.Column():
                shown = gradio.Image(
                    label="Tiles and tokens", type="pil", interactive=False, elem_id="grid"
                )
                tokens = gradio.Textbox(label="Tokens", interactive=False, elem_id="tokens")
                text = gradio.Textbox(label="Answer", interactive=False, elem_id="answer")
                cost = gradio.Textbox(label="Latency", interactive=False, elem_id="latency")
        for event in (file.change, side.release, side.change):
            event(grid, [file, side], [shown, tokens], api_name=False, show_progress="hidden")
        for event in (ask.click, question.submit):
            event(answer, [file, question, side], [text, cost], api_name="ask")
    return page


def draw_token_grid(image: Image.Image, processor: Any, side: int) -> tuple[Image.Image, int]:
    """A copy of an RGB image with its tiles and their token cells, and the number of tiles.

    The lines are where the cuts fall in the image itself; the thumbnail, one more tile of the whole
    image, has no lines.
    """
    settings = processor.image_processor
    columns, rows = grid_for(
        *image.size, settings.tile_size, settings.min_tiles, settings.max_tiles
    )
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


def _callbacks(
    gradio: Any, loaded: LoadedModel, max_new_tokens: int
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What the page calls: (answer, grid). Errors of the user show as a message."""

    def answer(file: str | None, question: str, side: float) -> tuple[str, str]:
        try:
            if not (question or "").strip():
                raise InputError("ask a question")
            if PLACEHOLDER in question:
                raise InputError(f"leave {PLACEHOLDER} out of the question")
            images = [open_image(file)] if file else []
            message = user_message(question, images)
            inputs = prepare_messages(loaded, [message], checked_side(loaded, side) ** 2)
            found = generate_answer(loaded, inputs, max_new_tokens)
        except InputError as error:
            raise gradio.Error(str(error), print_exception=False) from error
        return found.text, stats_line(found)

    def grid(file: str | None, side: float) -> tuple[Image.Image | None, str]:
        if not file:
            return None, ""
        try:
            n = checked_side(loaded, side)
            shown, tiles = draw_token_grid(open_image(file), loaded.processor, n)
        except InputError as error:
            raise gradio.Error(str(error), print_exception=False) from error
        return shown, f"{tiles} tile{'s' * (tiles != 1)} x {n * n} = {tiles * n * n} vision tokens"

    return answer, grid


def open_image(file: str) -> Image.Image:
    """An uploaded file as an upright RGB picture; InputError for anything that is not an image."""
    try:
        return load_rgb(Path(file), "the file")
    except ValueError as error:  # its own text names a temporary path of this machine
        raise InputError(
            f"{Path(file).name} cannot be used as an image; give a JPEG, PNG, WebP, GIF, BMP or "
            "TIFF file that opens elsewhere"
        ) from error


def checked_side(loaded: LoadedModel, side: float) -> int:
    """The slider's value; requests need not come from the page."""
    if not math.isfinite(side) or side != int(side) or not 1 <= side <= loaded.patches_per_side:
        raise InputError(f"n is {side}; give a whole number from 1 to {loaded.patches_per_side}")
    return int(side)
