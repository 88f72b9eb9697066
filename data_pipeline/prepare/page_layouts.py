"""How the pages of the demo corpus "pages" are laid out, and their painting."""

from dataclasses import dataclass
from itertools import product
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from data_pipeline.prepare.demo_sample import Glyph, Painting, Split
from data_pipeline.prepare.page_fonts import Print

PageKind = Literal["document", "table", "chart"]
Size = tuple[int, int]
"""Width and height in pixels."""

SIZES: tuple[Size, ...] = ((64, 64), (128, 64), (64, 128), (128, 128))
MARGIN, TITLE_HEIGHT, LINE_HEIGHT = 2, 18, 11
TITLE_X_HEIGHT, SMALL_X_HEIGHT = 8.0, 5.0
NAME_WIDTH, NUMBER_WIDTH = 33, 16
LARGEST_BAR = 9
PAPER = 255
# Not the run's seed: whatever is drawn, the held-out layouts stay the same ones.
SPLIT_SEED = 21
HELD_OUT_FRACTION = 0.2


class Layout(NamedTuple):
    """Where things are on a page.

    title: at which end; align: of the title and, in documents, of the lines; ruled: lines between
    the rows, an axis and ticks in charts; number_first: the numbers stand left of the words.
    """

    kind: PageKind
    size: Size
    title: Literal["top", "bottom"]
    align: Literal["left", "middle", "right"]
    ruled: bool
    number_first: bool

    @property
    def max_rows(self) -> int:
        """How many rows there is room for."""
        return (self.size[1] - TITLE_HEIGHT - MARGIN) // LINE_HEIGHT

    @property
    def max_values(self) -> tuple[int, int]:
        """How many words and how many numbers there is room for in a row."""
        spare = (self.size[0] - 2 * MARGIN - NAME_WIDTH - NUMBER_WIDTH) // NAME_WIDTH
        return {
            "document": (1 + spare, 1),
            "table": (1, 1 + spare * NAME_WIDTH // NUMBER_WIDTH),
            "chart": (1, 1),
        }[self.kind]


def _split_layouts() -> dict[Split, tuple[Layout, ...]]:
    """A fifth of the layouts of each kind and size is kept for evaluation."""
    found: dict[Split, list[Layout]] = {"train": [], "eval": []}
    rng = np.random.default_rng(SPLIT_SEED)
    kinds: tuple[PageKind, ...] = ("document", "table", "chart")
    for kind, size in product(kinds, SIZES):
        rest = product(("top", "bottom"), ("left", "middle", "right"), (False, True), (False, True))
        layouts = [Layout(kind, size, *choices) for choices in rest]  # type: ignore[arg-type]
        order = rng.permutation(len(layouts))
        held_out = round(len(layouts) * HELD_OUT_FRACTION)
        found["eval"] += [layouts[number] for number in order[:held_out]]
        found["train"] += [layouts[number] for number in order[held_out:]]
    return {split: tuple(layouts) for split, layouts in found.items()}


LAYOUTS = _split_layouts()


@dataclass(frozen=True)
class Page:
    """What is on a page: rows of words and numbers, as they are read; a chart's number is a bar."""

    layout: Layout
    font: str
    title: str
    rows: tuple[tuple[str, ...], ...]

    def paint(self) -> Painting:
        """The page in grey."""
        layout = self.layout
        image = Image.new("L", layout.size, PAPER)
        top = TITLE_HEIGHT if layout.title == "top" else MARGIN
        if layout.ruled:
            self._rule(image, top)
        glyphs = self._write_title(image)
        for number, row in enumerate(self.rows):
            baseline = top + number * LINE_HEIGHT + LINE_HEIGHT - 3
            if layout.kind == "document":
                glyphs += self._write_line(image, baseline, row)
            else:
                glyphs += self._write_cells(image, baseline, row)
        return Painting(image, glyphs)

    def _write_title(self, image: Image.Image) -> list[Glyph]:
        large = Print(self.font, TITLE_X_HEIGHT)
        height = image.height
        baseline = TITLE_HEIGHT - 4 if self.layout.title == "top" else height - MARGIN - 2
        return large.write(image, self._start(large.width(self.title)), baseline, self.title)

    def _start(self, width: float) -> float:
        """Where a text of this width begins, in px from the left."""
        spare = self.layout.size[0] - width
        return {"left": MARGIN, "middle": spare / 2, "right": spare - MARGIN}[self.layout.align]

    def _write_line(self, image: Image.Image, baseline: int, row: tuple[str, ...]) -> list[Glyph]:
        small, text = Print(self.font, SMALL_X_HEIGHT), " ".join(row)
        return small.write(image, self._start(small.width(text)), baseline, text)

    def _write_cells(self, image: Image.Image, baseline: int, row: tuple[str, ...]) -> list[Glyph]:
        """The cells of a table's row, or a bar with its name, each in its column."""
        small = Print(self.font, SMALL_X_HEIGHT)
        glyphs: list[Glyph] = []
        left = MARGIN
        for text in row:
            if text.isdigit() and self.layout.kind == "chart":
                self._draw_bar(image, left, baseline, int(text))
                left += LARGEST_BAR * self._unit
            else:
                glyphs += small.write(image, left, baseline, text)
                left += NUMBER_WIDTH if text.isdigit() else NAME_WIDTH
        return glyphs

    @property
    def _unit(self) -> int:
        """Length in pixels of 1 in a chart."""
        return (self.layout.size[0] - NAME_WIDTH - 2 * MARGIN) // LARGEST_BAR

    def _draw_bar(self, image: Image.Image, left: int, baseline: int, value: int) -> None:
        box = (left, baseline - 6, left + value * self._unit - 1, baseline - 1)
        ImageDraw.Draw(image).rectangle(box, fill=90)

    def _rule(self, image: Image.Image, top: int) -> None:
        """Lines under the rows; in charts ticks every three units instead."""
        draw, (width, _) = ImageDraw.Draw(image), image.size
        bottom = top + len(self.rows) * LINE_HEIGHT
        if self.layout.kind == "chart":
            left = MARGIN if self.layout.number_first else MARGIN + NAME_WIDTH
            for tick in range(0, LARGEST_BAR + 1, 3):
                x = left + tick * self._unit
                draw.line((x, top, x, bottom - 1), 190)
            return
        for y in range(top, bottom + 1, LINE_HEIGHT):
            draw.line((0, y - 1, width, y - 1), 170)
