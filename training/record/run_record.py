"""What a finished run measured, with the machine and versions it ran on."""

import json
from pathlib import Path
from typing import Any

from data_pipeline.errors import InputError
from data_pipeline.machine import measured_on
from training.metrics import read_metrics
from training.zero3 import PACKAGE

PACKAGES = ("torch", PACKAGE, "transformers", "webdataset", "sentencepiece")


def record(run: Path, command: str, wall_s: float) -> dict[str, Any]:
    """Command, its wall time in seconds, machine, versions, speed and accuracy of one run.

    Raises:
        InputError: if the run has not finished, so that it has no evaluation.
    """
    rows = read_metrics(run / "metrics.jsonl")
    evaluation = run / "evaluation.json"
    if not rows or not evaluation.is_file():
        raise InputError(f"{run} holds no finished run (metrics.jsonl and evaluation.json)")
    seconds = sum(row["step_s"] for row in rows)
    return {
        "command": command,
        "wall_s": wall_s,
        **measured_on(PACKAGES),
        "steps": len(rows),
        "training_s": round(seconds, 1),
        "tokens_per_s": round(sum(row["tokens"] for row in rows) / seconds),
        "padding": round(sum(row["padding"] for row in rows) / len(rows), 4),
        "data_wait": round(sum(row["data_wait"] * row["step_s"] for row in rows) / seconds, 4),
        "final_loss": rows[-1]["loss"],
        "evaluation": json.loads(evaluation.read_text(encoding="utf-8"))["results"],
    }
