"""The plan of one pass over a corpus, and its samples in other groups than the plan's."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from data_pipeline.corpus import Corpus, cost_of, open_corpus
from data_pipeline.plan import PackPlan, StepPlan
from training.config import RunConfig


class PlannedSample(NamedTuple):
    """A sample's tokens, image tokens included, and by image the side n and its tiles."""

    sample: int
    length: int
    sides: np.ndarray
    tiles: np.ndarray


@dataclass(frozen=True)
class EpochPlan:
    """All steps of a corpus that is gone through once."""

    corpus: Corpus
    steps: tuple[StepPlan, ...]

    @property
    def packs(self) -> list[PackPlan]:
        """Those of all steps, in order."""
        return [pack for step in self.steps for pack in step.packs]

    @cached_property
    def samples(self) -> list[PlannedSample]:
        """All samples, by their ids."""
        found = [
            PlannedSample(*row)
            for pack in self.packs
            for row in zip(
                pack.sample_ids.tolist(), pack.lengths.tolist(), pack.sides, pack.tiles, strict=True
            )
        ]
        return sorted(found, key=lambda planned: planned.sample)


def plan_of(config: RunConfig) -> EpochPlan:
    """The plan of a config whose datasets end.

    Raises:
        InputError: a shard is not indexed, or a setting is wrong.
    """
    cost = cost_of(config.model.vision.config, config.model.llm.config)
    corpus = open_corpus(config.data, config.seed, cost, config.train.loss_weighting)
    return EpochPlan(corpus, tuple(step for step, _ in corpus.planner.steps()))


def as_pack(samples: Sequence[PlannedSample]) -> PackPlan:
    """Samples as a pack, whatever its length."""
    return PackPlan(
        np.array([planned.sample for planned in samples], np.int64),
        np.array([planned.length for planned in samples], np.int64),
        tuple(planned.sides for planned in samples),
        tuple(planned.tiles for planned in samples),
    )


def grouped_by_length(
    samples: Sequence[PlannedSample], batch: int, ranks: int, seed: int
) -> list[list[PackPlan]]:
    """Batches of samples of like length: per step one for each rank.

    As length grouping is done elsewhere: shuffled, sorted within stretches of fifty batches, but at
    least four stretches; the last batches may be smaller.
    """
    order = np.random.default_rng(seed).permutation(len(samples)).tolist()
    stretch = batch * max(1, min(50, len(samples) // (batch * 4)))
    ordered: list[PlannedSample] = []
    for start in range(0, len(order), stretch):
        part = [samples[i] for i in order[start : start + stretch]]
        ordered += sorted(part, key=lambda planned: -planned.length)
    batches = [as_pack(ordered[i : i + batch]) for i in range(0, len(ordered), batch)]
    batches += [PackPlan.empty()] * (-len(batches) % ranks)
    return [batches[i : i + ranks] for i in range(0, len(batches), ranks)]
