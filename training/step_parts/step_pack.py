"""The pack that parts are profiled on: the plan's own, or one drawn as its settings say."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipeline.errors import InputError
from training.config import RunConfig
from training.estimate.packs import PackShape
from training.estimate.workload import find_corpus, vocabulary_of

MEDIAN, SIGMA = 128, 0.8  # of the text tokens of a drawn sample, lognormal
MISSES = 20  # samples that did not fit, after which a drawn pack is filled with text


@dataclass(frozen=True)
class StepPack(PackShape):
    """vocab_size: of the tokenizer, or of the config. source: where the pack is from, in words."""

    vocab_size: int
    source: str

    def __str__(self) -> str:
        return (
            f"{self.tokens} tokens in {len(self.lengths)} samples, {self.tiles} tiles, "
            f"{self.supervised} supervised, {self.source}"
        )


def find_pack(config: RunConfig, share: float) -> StepPack:
    """The fullest pack of the plan's first step, or a drawn one where the data cannot be opened.

    share: of the tokens of a drawn pack that are supervised.

    Raises:
        InputError: no tokenizer and no `model.llm.config.vocab_size` tells the vocabulary.
    """
    corpus, missing = find_corpus(config)
    if corpus is None:
        size = _vocab_size(config)
        lengths, sides = _drawn(config)
        supervised = max(1, round(share * sum(lengths)))
        source = f"drawn (text lognormal, median {MEDIAN}, sigma {SIGMA}), since {missing}"
        return StepPack(lengths, sides, supervised, size, source)
    step, _ = next(corpus.planner.steps())
    plan = max(step.packs, key=lambda pack: pack.tokens)
    supervised = sum(map(corpus.mixture.supervised_tokens, plan.sample_ids.tolist()))
    shape = PackShape.of(plan, supervised)
    size = corpus.tokenizer.vocab_size
    return StepPack(shape.lengths, shape.sides, supervised, size, "of the plan")


def _vocab_size(config: RunConfig) -> int:
    try:
        tokenizer: Any = vocabulary_of(config)[0]
    except InputError as error:
        raise InputError(
            f"the size of the vocabulary is not known: {error}; or set model.llm.config.vocab_size"
        ) from error
    return int(tokenizer.vocab_size)


def _drawn(config: RunConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Samples of one image each, its tiles and n as the settings allow, until the pack is full."""
    tokens, tiling, left = config.data.tokens, config.data.tiling, config.data.pack.max_tokens
    generator = np.random.default_rng(config.seed)
    lengths: list[int] = []
    sides: list[int] = []
    misses = 0
    while left and misses < MISSES:
        count = int(generator.choice(tokens.counts, p=tokens.shares))
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
