"""Steps of copies at several token counts, for tests on one or two ranks."""

from pathlib import Path

import numpy as np
from deepspeed.utils import safe_get_full_grad

from data_pipeline.index import Index
from data_pipeline.loader import StepBatch
from data_pipeline.plan import PackPlan, PlanState, StepPlan
from tests.training.scenarios import one_step, tiny_config
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
    meter = StepMeter(config.data.tokens.sides, config.data.pack.max_tokens, ranks)
    return one_step(engine, batch, 1, meter, run), gradients
