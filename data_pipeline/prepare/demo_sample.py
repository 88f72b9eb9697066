"""What every demo corpus gives: samples that know how to paint themselves, and its words."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from PIL import Image

Split = Literal["train", "eval"]


class Glyph(NamedTuple):
    """Something readable in a picture, and the box that it fills, in pixels; right, bottom past."""

    name: str
    left: int
    top: int
    right: int
    bottom: int


class Painting(NamedTuple):
    """A picture and all that is to be read in it."""

    image: Image.Image
    glyphs: list[Glyph]


@dataclass(frozen=True)
class DemoSample:
    """One question about one picture, which is painted when asked for.

    Attributes:
        metadata: kept with the sample; "detail" is the group that evaluations show it in.
    """

    question: str
    answer: str
    metadata: dict[str, Any]
    paint: Callable[[], Painting]


class DemoCorpus(Protocol):
    """A demo corpus with its settings.

    Attributes:
        settings: what is told of them in prepare.json.
        levels: how many levels of detail take turns in the samples.
        names: words and parts of words that are one token each, with and without a space before.
        glyph_names: the names that glyphs have.
    """

    settings: dict[str, Any]
    levels: int
    names: tuple[str, ...]
    glyph_names: tuple[str, ...]

    def samples(self, split: Split, num_samples: int, seed: int) -> Iterator[DemoSample]:
        """The samples of one split, a pure function of the arguments; more begin with the fewer."""
        ...

    def texts(self, num_samples: int, seed: int) -> Iterator[tuple[str, ...]]:
        """The tokenizer's texts besides `names`, by sample; each of their words is one token."""
        ...
