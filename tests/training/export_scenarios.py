"""What the export tests run on every rank: a small run, with what it evaluated sample by sample."""

import sys
from pathlib import Path
from typing import Any

import torch

from data_pipeline.batch import IGNORE
from data_pipeline.loader import PackedBatch
from data_pipeline.plan import PlanState
from tests.training.scenarios import full_parameters, one_step, tiny_config
from training import checkpoint
from training.config import save_config
from training.distributed import Ranks
from training.evaluate.in_training import evaluate
from training.metrics import MetricsLog, StepMeter
from training.run import Run
from training.zero3.engine import build_engine

Outcome = tuple[bool, int]
"""Whether an answer was right, and how many of its first tokens were, end of turn included."""


def train_and_evaluate(
    ranks: Ranks, corpus: Path, out: Path, steps: int, overrides: list[str]
) -> tuple[dict[str, Any], dict[tuple[int, int], Outcome]]:
    """All parameters after a run, and its outcome by (held-out sample, token count)."""
    config = tiny_config(corpus, f"output_dir={out}", f"train.steps={max(steps, 1)}", *overrides)
    run = Run(config, ranks)
    engine = build_engine(config, run.tokenizer, ranks)
    run.announce(engine)
    if ranks.is_main:
        out.mkdir(parents=True, exist_ok=True)
        save_config(config, out / "config.yaml")
    log = MetricsLog(out, ranks, steps, 0)
    meter = StepMeter(config.data.tokens.sides, config.data.pack.max_tokens, ranks)
    batches = run.loader.steps(PlanState())
    for step in range(1, steps + 1):
        meter.start()
        log.write(step, one_step(engine, next(batches), step, meter, run), show=False)
    batches.close()
    with checkpoint.Saver(out / "checkpoints", config.checkpoint, ranks) as saver:
        saver.save(engine, checkpoint.Progress(steps), run.fingerprints, wait=True)
    outcomes: dict[tuple[int, int], Outcome] = {}
    scoring: Any = sys.modules[evaluate.__module__]
    real = scoring.score_answers

    def recording(batch: PackedBatch, predictions: torch.Tensor, losses: torch.Tensor) -> Any:
        scores = real(batch, predictions, losses)
        outcomes.update(_outcomes(batch, predictions, dict(scores)))
        return scores

    scoring.score_answers = recording
    try:
        run.evaluate(engine, steps, log)
    finally:
        scoring.score_answers = real
    log.close()
    return full_parameters(engine), outcomes


def _outcomes(
    batch: PackedBatch, predictions: torch.Tensor, scores: dict[int, Any]
) -> dict[tuple[int, int], Outcome]:
    right = torch.zeros(len(batch.labels), dtype=torch.bool)
    supervised = batch.labels != IGNORE
    right[supervised] = predictions == batch.labels[supervised]
    found = {}
    for i, sample in enumerate(batch.sample_ids):
        own = slice(batch.cu_seqlens[i], batch.cu_seqlens[i + 1])
        answer = right[own][supervised[own]]
        leading = int(answer.int().cumprod(0).sum())
        found[sample, batch.sample_sides[i] ** 2] = (bool(scores[sample].exact), leading)
    return found
