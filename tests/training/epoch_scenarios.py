"""Runs of `train.epochs` that tell which samples they trained, for every rank of a pool."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.training import start_scenarios
from training import train as program
from training.distributed import Ranks

Trained = tuple[start_scenarios.Outcome, list[int]]
"""The outcome of the start, and the ids of the samples in this rank's packs, step after step."""


def run(ranks: Ranks, corpus: Path, out: Path, stop: int, *overrides: str) -> Trained:
    """Train as `start_scenarios.run` does, with packs long enough for few steps."""
    ids: list[int] = []
    real = program.train_step

    def step(*args: Any) -> Any:
        ids.extend(int(i) for pack in args[1].packs for i in pack.sample_ids)
        return real(*args)

    with patch.object(program, "train_step", step):
        settings = ("data.pack.max_tokens=2048", *overrides)
        return start_scenarios.run(ranks, corpus, out, *settings, stop=stop), ids
