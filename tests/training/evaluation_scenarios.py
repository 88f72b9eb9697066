"""Runs that are stopped or fail between a checkpoint and its evaluation, on all ranks."""

import json
import signal
from pathlib import Path
from typing import Any

from tests.training.scenarios import tiny_config
from training.checkpoint import best, finished
from training.distributed import Ranks
from training.health import StopRequest
from training.health.preemption import SIGNALS
from training.metrics import read_evaluations
from training.run import Run
from training.train import train

SETTINGS = (
    *("train.steps=8", "eval.every_steps=2", "checkpoint.every_steps=2", "eval.max_samples=7"),
    *("checkpoint.keep_best=loss", "checkpoint.keep=2", "data.tokens.counts=[4, 16, 64]"),
)


class CrashError(Exception):
    """Stands in for whatever ends a process."""


def run(
    ranks: Ranks, corpus: Path, out: Path, faults: dict[int, str], *overrides: str
) -> dict[str, Any]:
    """Train; the evaluation of a step in `faults` is "stopped" by a signal on rank 1, or "crash"es.

    Returns the exit code (None: crashed), evaluations, steps saved, the best, steps evaluated.
    """
    config = tiny_config(corpus, f"output_dir={out}", *SETTINGS, *overrides)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    stop, asked, code = StopRequest(), [], None
    real = Run.evaluate

    def evaluate(self: Run, engine: Any, step: int, *args: Any) -> Any:
        asked.append(step)
        fault = faults.get(len(asked))
        if fault == "crash":
            raise CrashError
        stop.requested |= fault == "stopped" and ranks.rank == ranks.world_size - 1
        return real(self, engine, step, *args)

    Run.evaluate = evaluate
    try:
        code = train(config, ranks, stop)
    except CrashError:
        pass
    finally:
        Run.evaluate = real
        for number, handler in handlers.items():
            signal.signal(number, handler)
    top = best(out / "checkpoints")
    return {
        "code": code,
        "rows": read_evaluations(out),
        "lines": len((out / "evaluations.jsonl").read_text().splitlines())
        if (out / "evaluations.jsonl").exists()
        else 0,
        "saved": [int(path.name[-8:]) for path in finished(out / "checkpoints")],
        "best": (top.path.name, top.value) if top else None,
        "asked": asked,
        "final": json.loads((out / "evaluation.json").read_text()) if code == 0 else None,
    }
