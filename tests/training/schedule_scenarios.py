"""Steps of copies at several token counts, for tests on one or two ranks."""

from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.index import Index
from data_pipeline.plan import PackPlan, PlanState
from tests.training.scenarios import new_meter, one_step, planned_gradients, tiny_config
from training import checkpoint
from training.distributed import Ranks
from training.run import Run
from training.zero3.engine import build_engine

Copies = list[tuple[int, list[int]]]
"""Samples of one picture, each with the n of its copies."""


def copies_pack(index: Index, samples: Copies) -> PackPlan:
    """A pack of these; empty for none."""
    if not samples:
        return PackPlan.empty()
    ids = np.array([sample for sample, sides in samples for _ in sides])
    sides = np.array([side for _, own in samples for side in own])
    return PackPlan(
        ids,
        index.text_tokens[ids].astype(np.int64) + sides**2,
        tuple(np.array([side]) for side in sides),
        tuple(np.ones(1, np.int64) for _ in ids),
        copies=np.array([len(own) for _, own in samples for _ in own]),
    )


def copies_gradients(
    ranks: Ranks, corpus: Path, packs: list[Copies], overrides: list[str]
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Metrics and whole gradients of one step made of these packs."""
    return planned_gradients(ranks, corpus, packs, copies_pack, overrides)


def resumed_step(
    ranks: Ranks, corpus: Path, folder: Path, overrides: list[str]
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Metrics of the second and third step of a run, and of one that resumed after the first."""
    config = tiny_config(corpus, "train.steps=3", *overrides)
    run = Run(config, ranks)
    engine = build_engine(config, run.tokenizer, ranks)
    _, plan = _steps(engine, run, PlanState(), [1])
    with checkpoint.Saver(folder, config.checkpoint, ranks) as saver:
        saver.save(engine, checkpoint.Progress(1, plan), run.fingerprints, wait=True)
    whole, _ = _steps(engine, run, plan, [2, 3])
    again = build_engine(config.model_copy(update={"seed": 7}), run.tokenizer, ranks)
    progress = checkpoint.load(again, checkpoint.checkpoints_at(folder)[0], run.fingerprints)
    return whole, _steps(again, run, progress.plan, [2, 3])[0]


def _steps(
    engine: Any, run: Run, plan: PlanState, numbers: list[int]
) -> tuple[list[dict[str, float]], PlanState]:
    meter, found = new_meter(run), []
    batches = run.loader.steps(plan)
    for number in numbers:
        meter.start()
        batch = next(batches)
        found.append(one_step(engine, batch, number, meter, run))
        plan = batch.state
    batches.close()
    return found, plan
