"""What the demo corpora have in common: images made of cells, and questions about the cells.

An image is a k x k grid of cells on one small canvas; k is the amount of detail. The more cells
an image has, the more vision tokens are needed to read all of them, which is what a model with a
flexible number of vision tokens should show.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, Literal

import numpy as np
from PIL import Image

from data_pipeline.errors import InputError
from data_pipeline.prepare.demo_sample import DemoSample, Glyph, Painting, Split

Question = Literal["all", "cell", "row", "count"]

# Twenty samples in a row of one k. "all" supervises the most cells per sample and so teaches
# fastest; a count teaches least.
QUESTION_CYCLE: tuple[Question, ...] = (
    *("all", "cell", "all", "row", "all", "all", "count", "all", "cell", "all"),
    *("all", "cell", "all", "row", "all", "all", "row", "all", "cell", "all"),
)


@dataclass(frozen=True)
class CellCorpus:
    """What differs between the demo corpora.

    Attributes:
        names: the word for each class of cell, without spaces.
        questions: the wording, formatted with row, column (from 1) and name.
        details: the default values of k.
        items: for each split, the ids of the items that a cell may show.
        labels: class of each item, int [items].
        paint: (item id, side in px) -> the picture of one cell, PIL image [side, side].
        image_size: default side of a picture in pixels.
        cycles: for each split, the kinds of question that take turns within one k.
    """

    names: tuple[str, ...]
    questions: Mapping[Question, str]
    details: tuple[int, ...]
    items: Mapping[Split, np.ndarray]
    labels: np.ndarray
    paint: Callable[[int, int], Image.Image]
    image_size: int = 32
    cycles: Mapping[Split, tuple[Question, ...]] = field(
        default_factory=lambda: dict.fromkeys(("train", "eval"), QUESTION_CYCLE)
    )


@dataclass(frozen=True)
class CellSample:
    """One question about one k x k grid; `layout` holds item ids row by row."""

    k: int
    layout: tuple[int, ...]
    kind: Question
    question: str
    answer: str


def draw_samples(
    corpus: CellCorpus, split: Split, num_samples: int, details: Sequence[int], seed: int
) -> Iterator[CellSample]:
    """The samples of one split, a pure function of the arguments.

    Values of k take turns, and so do the kinds of question within a k, so that every k gets the
    same number of samples and the same mix. No image of "eval" occurs in "train", save for k = 1
    where the splits share their items.
    """
    split_number = ("train", "eval").index(split)
    for number in range(num_samples):
        k = details[number % len(details)]
        rng = np.random.default_rng([seed, split_number, number])
        layout = _draw_layout(corpus, split, k, rng)
        cycle = corpus.cycles[split]
        kind = cycle[number // len(details) % len(cycle)]
        yield CellSample(k, layout, kind, *_ask(corpus, kind, k, layout, rng))


def _draw_layout(
    corpus: CellCorpus, split: Split, k: int, rng: np.random.Generator
) -> tuple[int, ...]:
    """Item ids of a k x k grid, [k * k], drawn among the grids that belong to this split."""
    # Where both splits draw from the same items, a tenth of all grids is kept for "eval".
    shared = k > 1 and np.array_equal(corpus.items["train"], corpus.items["eval"])
    while True:
        layout = tuple(rng.choice(corpus.items[split], size=k * k).tolist())
        held_out = zlib.crc32(np.asarray(layout, dtype="<i4").tobytes()) % 10 == 0
        if not shared or held_out == (split == "eval"):
            return layout


def _ask(
    corpus: CellCorpus, kind: Question, k: int, layout: Sequence[int], rng: np.random.Generator
) -> tuple[str, str]:
    """A question of this kind and its answer."""
    labels = corpus.labels[list(layout)]
    names = [corpus.names[label] for label in labels]
    row, column = (int(index) for index in rng.integers(k, size=2))
    # Asking for any class would mostly be answered by 0, which needs no look at the image.
    present = rng.random() < 0.7
    target = int(rng.choice(labels) if present else rng.integers(len(corpus.names)))
    answer = {
        "all": " ".join(names),
        "cell": names[row * k + column],
        "row": " ".join(names[row * k : (row + 1) * k]),
        "count": str(int((labels == target).sum())),
    }[kind]
    wording = corpus.questions[kind]
    return wording.format(row=row + 1, column=column + 1, name=corpus.names[target]), answer


class CellGrids:
    """A `DemoCorpus` of square pictures with k x k cells, k in `details`.

    Raises:
        InputError: a grid side that does not go with the size of the pictures.
    """

    def __init__(
        self,
        corpus: CellCorpus,
        image_size: int | None = None,
        details: Sequence[int] | None = None,
    ) -> None:
        self._corpus = corpus
        self._size = corpus.image_size if image_size is None else image_size
        self._details = corpus.details if details is None else tuple(details)
        _check_details(self._details, self._size)
        self.settings: dict[str, Any] = {"image_size": self._size, "details": self._details}
        self.levels = len(self._details)
        self.names = self.glyph_names = corpus.names
        self._paint_cell = lru_cache(maxsize=None)(corpus.paint)  # once per item and size

    def samples(self, split: Split, num_samples: int, seed: int) -> Iterator[DemoSample]:
        drawn = draw_samples(self._corpus, split, num_samples, self._details, seed)
        for sample in drawn:
            cells = list(sample.layout)
            metadata = {"detail": f"k={sample.k}", "question": sample.kind, "cells": cells}
            paint = partial(self._paint, sample)
            yield DemoSample(sample.question, sample.answer, metadata, paint)

    def texts(self, num_samples: int, seed: int) -> Iterator[tuple[str, ...]]:
        for sample in self.samples("train", num_samples, seed):
            yield sample.question, sample.answer

    def _paint(self, sample: CellSample) -> Painting:
        side = self._size // sample.k
        cells = [self._paint_cell(item, side) for item in sample.layout]
        canvas = Image.new(cells[0].mode, (self._size, self._size))
        glyphs = []
        for number, (item, cell) in enumerate(zip(sample.layout, cells, strict=True)):
            row, column = divmod(number, sample.k)
            left, top = column * side, row * side
            canvas.paste(cell, (left, top))
            name = self._corpus.names[self._corpus.labels[item]]
            glyphs.append(Glyph(name, left, top, left + side, top + side))
        return Painting(canvas, glyphs)


def _check_details(details: Sequence[int], image_size: int) -> None:
    if not details or len(set(details)) != len(details):
        raise InputError(f"the grid sides are {list(details)}; give one or more different ones.")
    for k in details:
        if not 1 <= k <= 9 or image_size % k or image_size < 4 * k:
            raise InputError(
                f"a grid side of {k} does not go with an image size of {image_size}: it has to be "
                "1 to 9, divide the image size, and leave at least 4 px for a cell."
            )
