"""The pack that parts are profiled on: the plan's own, or one drawn as its settings say."""

import math
from dataclasses import dataclass

import numpy as np

from data_pipeline.corpus import cost_of, open_corpus
from data_pipeline.errors import InputError
from training.config import RunConfig

MEDIAN, SIGMA = 128, 0.8  # of the text tokens of a drawn sample, lognormal
MISSES = 20  # samples that did not fit, after which a drawn pack is filled with text


@dataclass(frozen=True)
class StepPack:
    """lengths: tokens of each sample. sides: n of each tile. supervised: tokens with a label.

    vocab_size: of the tokenizer, or of the config. source: where the pack comes from, in words.
    """

    lengths: tuple[int, ...]
    sides: tuple[int, ...]
    supervised: int
    vocab_size: int
    source: str

    @property
    def tokens(self) -> int:
        """Length of the pack."""
        return sum(self.lengths)

    def __str__(self) -> str:
        return (
            f"{self.tokens} tokens in {len(self.lengths)} samples, {len(self.sides)} tiles, "
            f"{self.supervised} supervised, {self.source}"
        )


def find_pack(config: RunConfig, share: float) -> StepPack:
    """The fullest pack of the plan's first step, or a drawn one where the data cannot be opened.

    share: of the tokens that are supervised, which no index knows.

    Raises:
        InputError: no tokenizer and no `model.llm.config.vocab_size` tells the vocabulary.
    """
    data, known = config.data, config.model.llm.config.get("vocab_size")
    cost = cost_of(config.model.vision.config, config.model.llm.config)
    try:
        corpus = open_corpus(data, config.seed, cost, config.train.loss_weighting)
        step, _ = next(corpus.planner.steps())
    except InputError as error:
        if not isinstance(known, int):
            raise InputError(
                f"the size of the vocabulary is not known: {error}; or set "
                "model.llm.config.vocab_size"
            ) from error
        lengths, sides = _drawn(config)
        source = f"drawn (text lognormal, median {MEDIAN}, sigma {SIGMA}), since {error}"
        return StepPack(lengths, sides, _supervised(lengths, share), known, source)
    pack = max(step.packs, key=lambda pack: pack.tokens)
    of_images = zip(np.concatenate(pack.sides), np.concatenate(pack.tiles), strict=True)
    sides = tuple(int(n) for n, tiles in of_images for _ in range(tiles))
    lengths = tuple(pack.lengths.tolist())
    vocab_size = corpus.tokenizer.vocab_size
    return StepPack(lengths, sides, _supervised(lengths, share), vocab_size, "of the plan")


def _supervised(lengths: tuple[int, ...], share: float) -> int:
    return max(1, round(share * sum(lengths)))


def _drawn(config: RunConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Samples of one image each, its tiles and n as the settings allow, until the pack is full."""
    tokens, tiling, left = config.data.tokens, config.data.tiling, config.data.pack.max_tokens
    generator = np.random.default_rng(config.seed)
    lengths: list[int] = []
    sides: list[int] = []
    misses = 0
    while left and misses < MISSES:
        count = int(generator.choice(tokens.counts, p=tokens.probabilities))
        tiles = int(generator.integers(tiling.min_tiles, tiling.max_tiles, endpoint=True))
        tiles += tiling.thumbnail and tiles > 1
        length = tiles * count + math.ceil(generator.lognormal(math.log(MEDIAN), SIGMA))
        if length > left:
            misses += 1
            continue
        lengths.append(length)
        sides += [math.isqrt(count)] * tiles
        left -= length
    return tuple(lengths + [left] * bool(left)), tuple(sides)
