"""What the demo corpora have in common: images made of cells, and questions about the cells.

An image is a k x k grid of cells on one small canvas; k is the amount of detail. The more cells
an image has, the more vision tokens are needed to read all of them, which is what a model with a
flexible number of vision tokens should show.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from typing import Literal

import numpy as np
from PIL import Image

Split = Literal["train", "eval"]
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
    """

    names: tuple[str, ...]
    questions: Mapping[Question, str]
    details: tuple[int, ...]
    items: Mapping[Split, np.ndarray]
    labels: np.ndarray
    paint: Callable[[int, int], Image.Image]


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
        kind = QUESTION_CYCLE[number // len(details) % len(QUESTION_CYCLE)]
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


class Pictures:
    """Draws samples as PNG files; each item is painted once per cell size."""

    def __init__(self, corpus: CellCorpus, image_size: int) -> None:
        self._paint = lru_cache(maxsize=None)(corpus.paint)
        self._size = image_size

    def draw(self, sample: CellSample) -> bytes:
        """The PNG file of a sample's grid."""
        side = self._size // sample.k
        cells = [self._paint(item, side) for item in sample.layout]
        canvas = Image.new(cells[0].mode, (self._size, self._size))
        for number, cell in enumerate(cells):
            row, column = divmod(number, sample.k)
            canvas.paste(cell, (column * side, row * side))
        buffer = BytesIO()
        canvas.save(buffer, "png")
        return buffer.getvalue()
