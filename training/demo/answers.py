"""What the page calls; errors of the user show as a message."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from data_pipeline.errors import InputError
from data_pipeline.processor.prompt_tokenflex import IMAGE as PLACEHOLDER
from data_pipeline.processor.source_tokenflex import load_rgb
from training.demo.token_grid import draw_token_grid
from training.generate import Answer, LoadedModel, generate_answer
from training.generate.answer import prepare_messages, stats_line
from training.generate.comparison import comparison_row
from training.generate.conversation import user_message
from training.model.known_counts import known_counts

MOST_TILES = 24
"""The most that the page offers, and more than most models are used with."""


class Answers:
    """The functions behind the page's buttons.

    side: n of the n x n tokens of a tile. tiles: of an image, at most. file: an image's path.
    """

    def __init__(self, gradio: Any, loaded: LoadedModel, max_new_tokens: int) -> None:
        self._gradio, self._loaded, self._max_new_tokens = gradio, loaded, max_new_tokens
        self.known = known_counts(loaded.config)
        self._warm: set[tuple[int, ...]] = set()
        self.most_tiles = max(MOST_TILES, loaded.processor.image_processor.max_tiles)

    def answer(self, file: str | None, question: str, side: float, tiles: float) -> Any:
        """(the answer, labelled with its count; what it cost)."""
        with self._said():
            count = checked_side(self._loaded, side) ** 2
            found = self._ask(self._message(file, question), count, self._checked_tiles(tiles))
        label = f"Answer at {count} tokens per tile"
        return self._gradio.update(value=found.text, label=label), stats_line(found)

    def compare(
        self, file: str | None, question: str, counts: Sequence[int], tiles: float
    ) -> Iterator[list[list[str]]]:
        """The rows of the table, one more each time."""
        rows: list[list[str]] = []
        with self._said():
            if not counts:
                raise InputError("choose the token counts to compare")
            message, most = self._message(file, question), self._checked_tiles(tiles)
            for count in self._loaded.check_counts([int(count) for count in counts], "counts"):
                rows.append(comparison_row(count, self._ask(message, count, most)))
                yield rows

    def grid(
        self, file: str | None, side: float, tiles: float
    ) -> tuple[Image.Image | None, str, str]:
        """(the image with its tokens, their number, what is known of the count)."""
        with self._said():
            n, most = checked_side(self._loaded, side), self._checked_tiles(tiles)
            if not file:
                return None, "", self.of(n)
            shown, number = draw_token_grid(open_image(file), self._loaded.processor, n, most)
        total = f"{number} tile{'s' * (number != 1)} x {n * n} = {number * n * n} vision tokens"
        return shown, total, self.of(n)

    def of(self, side: int) -> str:
        """What is known of a slider's value."""
        return f"{side * side} tokens per tile: {self.known.of(side * side)}."

    def is_trained(self, count: int) -> bool:
        """Whether the model's config says so."""
        return count in (self.known.trained or ())

    def _message(self, file: str | None, question: str) -> dict[str, Any]:
        if not (question or "").strip():
            raise InputError("ask a question")
        if PLACEHOLDER in question:
            raise InputError(f"leave {PLACEHOLDER} out of the question")
        return user_message(question, [open_image(file)] if file else [])

    def _ask(self, message: dict[str, Any], count: int, tiles: int) -> Answer:
        """A timed answer; before the first of every shape, one that warms up and is not shown."""
        inputs = prepare_messages(self._loaded, [message], count, tiles)
        shape = (count, len(inputs.get("pixel_values", ())))
        if shape not in self._warm:
            generate_answer(self._loaded, inputs, 2)
            self._warm.add(shape)
        return generate_answer(self._loaded, inputs, self._max_new_tokens)

    def _checked_tiles(self, tiles: float) -> int:
        least = self._loaded.processor.image_processor.min_tiles
        return _checked("max_tiles", tiles, least, self.most_tiles)

    @contextmanager
    def _said(self) -> Iterator[None]:
        try:
            yield
        except InputError as error:
            raise self._gradio.Error(str(error), print_exception=False) from error


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
    return _checked("n", side, 1, loaded.patches_per_side)


def _checked(name: str, value: float, least: int, most: int) -> int:
    if not math.isfinite(value) or value != int(value) or not least <= value <= most:
        raise InputError(f"{name} is {value}; give a whole number from {least} to {most}")
    return int(value)
