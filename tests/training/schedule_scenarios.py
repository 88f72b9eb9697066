"""Steps of copies at several token counts, for tests on one or two ranks."""

from pathlib import Path
from typing import Any

import numpy as np
from deepspeed.utils import safe_get_full_grad

from data_pipeline.index import Index
from data_pipeline.loader import StepBatch
from data_pipeline.plan import PackPlan, PlanState, StepPlan
from tests.training.scenarios import one_step, tiny_config
from training import checkpoint
from training.distributed import Ranks
from training.metrics import StepMeter
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
    config = tiny_config(
        corpus, f"data.pack.packs_per_step={len(packs)}", "train.clip_grad_norm=0", *overrides
    )
    run = Run(config, ranks)
    engine = build_engine(config, run.tokenizer, ranks)
    gradients: dict[str, np.ndarray] = {}
    deepspeed = engine.deepspeed
    real_step = deepspeed.step

    def capture_then_step() -> None:
        if deepspeed.is_gradient_accumulation_boundary():
            for name, parameter in engine.module.named_parameters():
                gradients[name] = safe_get_full_grad(parameter).detach().clone().numpy()
        real_step()

    deepspeed.step = capture_then_step
    index = run.mixture.datasets[0].index
    plans = [copies_pack(index, pack) for pack in packs[ranks.rank :: ranks.world_size]]
    batches = [run.loader._builder.build(plan) for plan in plans]
    batch = StepBatch(batches, PlanState(), StepPlan(0, 0, tuple(plans)), 0.0)
    return one_step(engine, batch, 1, new_meter(run), run), gradients


def new_meter(run: Run) -> StepMeter:
    """As the trainer makes it."""
    data, consistency = run.config.data, run.config.consistency_weight is not None
    sides, length = data.tokens.sides, data.pack.max_tokens
    return StepMeter(sides, length, run.ranks, consistency=consistency)


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
