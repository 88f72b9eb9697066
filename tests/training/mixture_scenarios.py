"""Scenarios of training on several datasets, run on every rank of a pool."""

from pathlib import Path
from typing import Any

from data_pipeline.errors import InputError
from tests.training.scenarios import tiny_config
from training.distributed import Ranks
from training.metrics import read_metrics
from training.train import train


def datasets(corpus: Path, repeat: str = "null") -> list[str]:
    """Overrides: three weighted datasets, the first of which ends after `repeat` epochs."""
    shards = f"[{corpus / 'train'}]"
    parts = (("a", 3, repeat), ("b", 2, "null"), ("c", 1, "null"))
    named = ", ".join(
        f"{name}: {{shards: {shards}, weight: {weight}, repeat: {times}}}"
        for name, weight, times in parts
    )
    return ["data.shards=[]", f"data.datasets={{{named}}}"]


def run(ranks: Ranks, corpus: Path, out: Path, *overrides: str) -> tuple[list[dict[str, Any]], str]:
    """Train as the command does; returns the metrics, and the error if there was one."""
    config = tiny_config(
        corpus, f"output_dir={out}", "data.eval_shards=[]", "train.log_every=1", *overrides
    )
    error = ""
    try:
        assert train(config, ranks) == 0
    except InputError as found:
        error = str(found)
    return read_metrics(out / "metrics.jsonl"), error
