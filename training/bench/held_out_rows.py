"""One score for every arm: the mean cross-entropy of held-out answers, on the same rows."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from data_pipeline.batch import IGNORE
from data_pipeline.corpus import make_exact_builder
from training.bench.bench_workload import held_out_data
from training.bench.padded_rows import padded_rows
from training.bench.planned_samples import as_pack, plan_of
from training.config import RunConfig

_ROWS = 8

LossSum = Callable[[dict[str, Any]], float]
"""The sum of the cross-entropy over the supervised tokens of rows."""


class HeldOutRows:
    """The held-out samples of a workload, by length, as padded rows."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        config = held_out_data(config, folder)
        plan = plan_of(config)
        self._corpus = plan.corpus
        self._builder = make_exact_builder(config.data, plan.corpus.mixture, plan.corpus.tokenizer)
        self._samples = sorted(plan.samples, key=lambda planned: planned.length)

    def batches(self) -> Iterator[dict[str, Any]]:
        """All of them, a few rows at a time."""
        for start in range(0, len(self._samples), _ROWS):
            pack = self._builder.build(as_pack(self._samples[start : start + _ROWS]))
            yield padded_rows(pack, self._corpus.tokenizer.pad_id)

    def score(self, model: Any, loss_sum: LossSum) -> float:
        """The mean, by a model that is in evaluation mode meanwhile; all ranks must call this."""
        total, supervised = 0.0, 0
        model.eval()
        with torch.no_grad():
            for rows in self.batches():
                total += loss_sum(rows)
                supervised += int((rows["labels"] != IGNORE).sum())
        model.train()
        return total / supervised


def token_loss_sum(model: Any) -> LossSum:
    """By the trainer's model, or an engine around it."""
    return lambda rows: float(model(**rows).token_losses.double().sum())
