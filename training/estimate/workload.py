"""What a run will be given: extreme and mean packs of its plan, or those its settings allow."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from data_pipeline.corpus import Corpus, cost_of, open_corpus
from data_pipeline.errors import InputError
from data_pipeline.tokenizer import load_tokenizer
from training.config import RunConfig
from training.estimate.packs import PackShape, extremes, largest_pack
from training.flops import PackCost, PartFlops

_MOST_PACKS = 512
"""Planned packs that the mean and the extremes are taken from."""


class ConfigVocabulary:
    """Stands for a tokenizer that is not at hand: the language model's config knows its size."""

    def __init__(self, size: int) -> None:
        self.vocab_size = size

    def special_id(self, token: str) -> int:
        """Any id: nothing is looked up."""
        return self.vocab_size - 1


@dataclass(frozen=True)
class Workload:
    """Packs to estimate by.

    worst: what memory is measured with. tokens, flops: mean of a pack. source: where that is from.
    """

    worst: list[PackShape]
    tokens: float
    flops: PartFlops
    source: str


def vocabulary_of(config: RunConfig) -> tuple[object, str]:
    """The run's tokenizer, or what stands for it; and, if so, why."""
    try:
        return load_tokenizer(config.data.tokenizer), ""
    except InputError as error:
        size = config.model.llm.config.get("vocab_size")
        if size is None:
            raise
        return ConfigVocabulary(int(size)), str(error)


def find_corpus(config: RunConfig) -> tuple[Corpus | None, str]:
    """The run's data with its plan; None, and why, where they are not at hand."""
    cost = cost_of(config.model.vision.config, config.model.llm.config)
    train = config.train
    try:
        corpus = open_corpus(config.data, config.seed, cost, train.loss_weighting, train.epochs)
        corpus.planner.check()
    except InputError as error:
        return None, str(error)
    return corpus, ""


def workload_of(config: RunConfig, corpus: Corpus | None, cost: PackCost) -> Workload:
    """The packs of the plan's first windows; without data, the fullest that the settings allow."""
    pack = config.data.pack
    if corpus is None:
        worst = [largest_pack(config, pack.max_tokens, pack.max_tiles)]
        return Workload(
            worst, worst[0].tokens, flops_of(worst[0], cost), "the fullest pack: no index was found"
        )
    planned = list(islice(_planned(corpus), _MOST_PACKS))
    flops = [flops_of(shape, cost) for shape in planned]
    mean = PartFlops(*(float(np.mean([getattr(f, k) for f in flops])) for k in ("model", "extra")))
    tokens = float(np.mean([shape.tokens for shape in planned]))
    return Workload(extremes(planned), tokens, mean, f"{len(planned)} packs of the plan")


def flops_of(pack: PackShape, cost: PackCost) -> PartFlops:
    """FLOPs of a pack, all parts together."""
    return sum(cost.pack(pack.lengths, pack.sides, pack.supervised).values(), PartFlops())


def _planned(corpus: Corpus) -> Iterator[PackShape]:
    for step, _ in corpus.planner.steps():
        for plan in step.packs:
            supervised = sum(map(corpus.mixture.supervised_tokens, plan.sample_ids.tolist()))
            yield PackShape.of(plan, supervised)
