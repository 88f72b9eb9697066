"""What a finished run measured, with the machine and versions it ran on."""

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from data_pipeline.errors import InputError
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
        "machine": machine(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "steps": len(rows),
        "training_s": round(seconds, 1),
        "tokens_per_s": round(sum(row["tokens"] for row in rows) / seconds),
        "padding": round(sum(row["padding"] for row in rows) / len(rows), 4),
        "data_wait": round(sum(row["data_wait"] * row["step_s"] for row in rows) / seconds, 4),
        "final_loss": rows[-1]["loss"],
        "evaluation": json.loads(evaluation.read_text(encoding="utf-8"))["results"],
    }


def machine() -> str:
    """The GPUs, or the processor and the number of cores this process may use."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {len(os.sched_getaffinity(0))} cores"
