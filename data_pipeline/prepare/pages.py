"""Demo corpus "pages": documents, tables and charts of several sizes, asked for more or less.

A title in large print, and rows in small print: of words and a number in a document, of a name and
numbers in a table, of a name and a bar in a chart. Words are made of two syllables, each of which
is one token, so that a word that was never trained on can be read, and written, all the same.
"""

import zlib
from collections.abc import Iterator
from itertools import product
from typing import Any, Literal

import numpy as np

from data_pipeline.prepare.demo_sample import DemoSample, Split
from data_pipeline.prepare.page_fonts import FONTS
from data_pipeline.prepare.page_layouts import LAYOUTS, Layout, Page, PageKind

Level = Literal["word", "number", "row"]
LEVELS: tuple[Level, ...] = ("word", "number", "row")

CONSONANTS, VOWELS = "klmpst", "aiou"
SYLLABLES = tuple(a + b for a, b in product(CONSONANTS, VOWELS))
# A tenth of all words and of all numbers is kept for evaluation.
HELD_OUT = 10

QUESTIONS: dict[tuple[PageKind, Level], str] = {
    **{(kind, "word"): "What is the title?" for kind in ("document", "table", "chart")},
    ("document", "number"): "Which number is in row {row}?",
    ("table", "number"): "Which number is in row {row} column {column}?",
    ("chart", "number"): "How long is bar {row}?",
    **{(kind, "row"): "Read row {row}." for kind in ("document", "table", "chart")},
}


def _is_held_out(text: str) -> bool:
    return zlib.crc32(text.encode()) % HELD_OUT == 0


def _split(texts: list[str]) -> dict[Split, tuple[str, ...]]:
    return {
        "train": tuple(text for text in texts if not _is_held_out(text)),
        "eval": tuple(text for text in texts if _is_held_out(text)),
    }


WORDS = _split([a + b for a, b in product(SYLLABLES, SYLLABLES)])
NUMBERS = _split([str(number) for number in range(10, 100)])
BAR_LENGTHS = tuple("123456789")


class Pages:
    """The `DemoCorpus` of pages; held out are fonts, layouts, words and numbers, all at once."""

    levels = len(LEVELS)
    names = (*SYLLABLES, *"0123456789")
    glyph_names = (*CONSONANTS, *VOWELS, *"0123456789")

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {}

    def samples(self, split: Split, num_samples: int, seed: int) -> Iterator[DemoSample]:
        """Levels of detail take turns, and kinds of page within a level."""
        split_number = ("train", "eval").index(split)
        for number in range(num_samples):
            rng = np.random.default_rng([seed, split_number, number])
            level = LEVELS[number % len(LEVELS)]
            kind = ("document", "table", "chart")[number // len(LEVELS) % 3]
            layouts = [layout for layout in LAYOUTS[split] if layout.kind == kind]
            page = _draw_page(layouts[rng.integers(len(layouts))], split, rng)
            question, answer = _ask(page, level, rng)
            metadata = {
                "detail": level,
                "page": kind,
                "size": list(page.layout.size),
                "font": page.font,
                "layout": [*page.layout[2:]],
                "title": page.title,
                "rows": [list(row) for row in page.rows],
            }
            yield DemoSample(question, answer, metadata, page.paint)

    def texts(self, num_samples: int, seed: int) -> Iterator[tuple[str, ...]]:
        """Questions only: words of an answer are to stay in syllables, numbers in digits.

        Names come so often that no pair of letters across syllables is joined before them, and
        questions so often that none of their letters is too rare to be kept.
        """
        for sample in self.samples("train", num_samples, seed):
            yield *[sample.question] * 3, *self.names * 4


def _draw_page(layout: Layout, split: Split, rng: np.random.Generator) -> Page:
    """A page with this layout, of words, numbers and a font of this split."""

    def choose(texts: tuple[str, ...]) -> str:
        return texts[rng.integers(len(texts))]

    num_rows = int(rng.integers(2, layout.max_rows + 1))
    most_words, most_numbers = layout.max_values
    num_words = int(rng.integers(1, most_words + 1))
    num_numbers = int(rng.integers(1, most_numbers + 1))
    numbers = BAR_LENGTHS if layout.kind == "chart" else NUMBERS[split]
    rows = []
    for _ in range(num_rows):
        words = [choose(WORDS[split]) for _ in range(num_words)]
        values = [choose(numbers) for _ in range(num_numbers)]
        rows.append((*values, *words) if layout.number_first else (*words, *values))
    return Page(layout, choose(FONTS[split]), choose(WORDS[split]), tuple(rows))


def _ask(page: Page, level: Level, rng: np.random.Generator) -> tuple[str, str]:
    """A question at this level and its answer."""
    row = int(rng.integers(len(page.rows)))
    cells = page.rows[row]
    columns = [column for column, text in enumerate(cells) if text.isdigit()]
    column = columns[rng.integers(len(columns))]
    answer = {"word": page.title, "number": cells[column], "row": " ".join(cells)}[level]
    wording = QUESTIONS[page.layout.kind, level]
    return wording.format(row=row + 1, column=column + 1), answer
