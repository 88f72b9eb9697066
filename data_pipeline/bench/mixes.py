"""Synthetic mixes of sample lengths, to measure packing on."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from data_pipeline.balance.deal import Ints

TEXT_MEDIAN, TEXT_SIGMA = 120, 0.9
"""Of the tokens of a text."""
STANDARD_IMAGES = (0.15, 0.60, 0.12, 0.07, 0.06)
"""Probabilities of 0, 1, .. images in a sample of `standard`."""
_TOKENS_PER_TILE = (64, 144, 256)
_TOKENS_AROUND_IMAGE = 2


class Lengths(NamedTuple):
    """Tokens and tiles of samples, int64 [S] each."""

    tokens: Ints
    tiles: Ints


Mix = Callable[[np.random.Generator, int, int], Lengths]
"""(random numbers, samples, max_tokens) -> lengths; longer samples are not left out yet."""


def draw_mix(name: str, seed: int, samples: int, max_tokens: int) -> Lengths:
    """Samples of a mix of `MIXES`; those longer than max_tokens are left out, so may be fewer."""
    lengths = MIXES[name](np.random.default_rng(seed), samples, max_tokens)
    fits = lengths.tokens <= max_tokens
    return Lengths(lengths.tokens[fits], lengths.tiles[fits])


def draw_text(
    rng: np.random.Generator,
    samples: int,
    median: float = TEXT_MEDIAN,
    sigma: float = TEXT_SIGMA,
) -> Ints:
    """Tokens of texts, lognormal and at least 8, int64 [samples]."""
    return np.maximum(8, rng.lognormal(np.log(median), sigma, samples)).astype(np.int64)


def _with_images(rng: np.random.Generator, text: Ints, images: Ints, most_tiles: int) -> Lengths:
    """Texts and, for each, its number of images of 1 to most_tiles tiles."""
    owner = np.repeat(np.arange(len(text)), images)
    tiles = rng.integers(1, most_tiles + 1, len(owner))
    tokens = tiles * rng.choice(_TOKENS_PER_TILE, len(owner)) + _TOKENS_AROUND_IMAGE
    count = np.zeros((2, len(text)), dtype=np.int64)
    np.add.at(count[0], owner, tokens)
    np.add.at(count[1], owner, tiles)
    return Lengths(text + count[0], count[1])


def _of_images(*probabilities: float) -> Mix:
    """Short texts with 0, 1, .. images of 1 to 7 tiles."""

    def draw(rng: np.random.Generator, samples: int, max_tokens: int) -> Lengths:
        text = draw_text(rng, samples)
        images = rng.choice(len(probabilities), samples, p=probabilities)
        return _with_images(rng, text, images, 7)

    return draw


def _long_text(rng: np.random.Generator, samples: int, max_tokens: int) -> Lengths:
    return Lengths(draw_text(rng, samples, 1500, 1.0), np.zeros(samples, dtype=np.int64))


def _single_image(rng: np.random.Generator, samples: int, max_tokens: int) -> Lengths:
    text = draw_text(rng, samples)
    return _with_images(rng, text, np.ones(samples, dtype=np.int64), 12)


def _many_images(rng: np.random.Generator, samples: int, max_tokens: int) -> Lengths:
    return _with_images(rng, draw_text(rng, samples), rng.integers(4, 17, samples), 7)


def _bimodal(rng: np.random.Generator, samples: int, max_tokens: int) -> Lengths:
    """Every second sample is a text of 55 to 95 % of a pack."""
    short = MIXES["standard"](rng, samples, max_tokens)
    long = rng.integers(int(0.55 * max_tokens), int(0.95 * max_tokens) + 1, samples)
    is_long = rng.random(samples) < 0.5
    return Lengths(np.where(is_long, long, short.tokens), np.where(is_long, 0, short.tiles))


def _equal(rng: np.random.Generator, samples: int, max_tokens: int) -> Lengths:
    return Lengths(np.full(samples, 700), np.full(samples, 3))


MIXES: dict[str, Mix] = {
    "standard": _of_images(*STANDARD_IMAGES),
    "text_heavy": _of_images(0.80, 0.14, 0.03, 0.02, 0.01),
    "long_text": _long_text,
    "single_image": _single_image,
    "many_images": _many_images,
    "bimodal": _bimodal,
    "equal": _equal,
}
"""By name. `standard`: text of median 120 tokens, 0 to 4 images of 1 to 7 tiles of 64, 144 or 256
tokens; the others are chosen to be hard in different ways."""
