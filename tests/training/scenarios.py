"""What the multi-rank tests run on every rank: small real engines on a small real corpus."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

from data_pipeline.index import Index
from data_pipeline.loader import StepBatch
from data_pipeline.plan import PackPlan, PlanState, StepPlan
from training import checkpoint
from training.config import RunConfig, load_config
from training.distributed import Ranks
from training.health import LossGuard
from training.metrics import StepMeter
from training.run import Run
from training.step import shared_denominator, train_step
from training.zero3.engine import build_engine

DIGITS = "training/configs/digits.yaml"


def tiny_overrides(corpus: Path) -> list[str]:
    """The digits preset on a small corpus, with every parameter partitioned."""
    return [
        "data.prepare=null",
        f"data.shards=[{corpus / 'train'}]",
        f"data.eval_shards=[{corpus / 'eval'}]",
        f"data.tokenizer={corpus / 'tokenizer.model'}",
        "data.tokens={counts: [4, 16, 64], probabilities: [0.34, 0.33, 0.33]}",
        "data.pack.max_tokens=512",
        "data.pack.window_samples=100",
        "deepspeed.param_persistence_threshold=0",
        "model.vision.config.num_hidden_layers=1",
        "model.llm.config.num_hidden_layers=2",
        "train.precision=fp32",  # many CPUs take fifty times as long in bf16
    ]


def tiny_config(corpus: Path, *overrides: str) -> RunConfig:
    return load_config(DIGITS, [*tiny_overrides(corpus), "output_dir=unused", *overrides])


def full_parameters(engine: Any) -> dict[str, np.ndarray]:
    """Every parameter, whole, as float32 (all ranks must call this)."""
    import deepspeed

    values = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            values[name] = safe_get_full_fp32_param(parameter).detach().clone().numpy()
        else:
            with deepspeed.zero.GatheredParameters([parameter]):
                values[name] = parameter.detach().float().clone().numpy()
    return values


def one_step(
    engine: Any, batch: StepBatch, step: int, meter: StepMeter, run: Run
) -> dict[str, float]:
    """What the training loop does for a step."""
    denominator = shared_denominator(batch, False, run.ranks)
    assert denominator is not None
    return train_step(engine, batch, denominator, step, meter, run, LossGuard(run.config.faults))


def step_gradients(
    ranks: Ranks, corpus: Path, packs: list[list[int]], overrides: list[str]
) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and whole gradients of one step made of these packs (sample ids, side 2)."""
    metrics, gradients = planned_gradients(ranks, corpus, packs, pack_plan, overrides)
    return metrics["loss"], gradients


def planned_gradients(
    ranks: Ranks,
    corpus: Path,
    packs: list[Any],
    plan: Callable[[Index, Any], PackPlan],
    overrides: list[str],
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Metrics and whole gradients of one step made of these packs, as `plan` makes each."""
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
    plans = [plan(index, pack) for pack in packs[ranks.rank :: ranks.world_size]]
    batches = [run.loader._builder.build(plan) for plan in plans]
    batch = StepBatch(batches, PlanState(), StepPlan(0, 0, tuple(plans)), 0.0)
    return one_step(engine, batch, 1, new_meter(run), run), gradients


def new_meter(run: Run) -> StepMeter:
    """As the trainer makes it."""
    data, consistency = run.config.data, run.config.consistency_weight is not None
    sides, length = data.tokens.sides, data.pack.max_tokens
    return StepMeter(sides, length, run.ranks, consistency=consistency)


def pack_plan(index: Index, ids: list[int]) -> PackPlan:
    """A pack of one-image samples at 4 tokens per tile; empty for no ids."""
    one = tuple(np.ones(1, np.int64) for _ in ids)
    lengths = index.text_tokens[ids].astype(np.int64) + 4
    return (
        PackPlan(np.array(ids), lengths, tuple(2 * n for n in one), one)
        if ids
        else PackPlan.empty()
    )


def train_steps(
    ranks: Ranks, corpus: Path, steps: int, overrides: list[str]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """All parameters before and after `steps` optimizer steps."""
    config = tiny_config(corpus, f"train.steps={max(steps, 1)}", *overrides)
    run = Run(config, ranks)
    engine = build_engine(config, run.tokenizer, ranks)
    before = full_parameters(engine)
    meter = StepMeter(config.data.tokens.sides, config.data.pack.max_tokens, ranks)
    batches = run.loader.steps(PlanState())
    for step in range(1, steps + 1):
        meter.start()
        one_step(engine, next(batches), step, meter, run)
    batches.close()
    return before, full_parameters(engine)


def step_metrics(ranks: Ranks, corpus: Path, peak: float | None) -> dict[str, float]:
    """The metrics of a run's first step, on devices of this peak FLOP/s."""
    config = tiny_config(corpus, "train.log_every=5")
    run = Run(config, ranks)
    engine = build_engine(config, run.tokenizer, ranks)
    sides, length = config.data.tokens.sides, config.data.pack.max_tokens
    meter = StepMeter(sides, length, ranks, (), run.pack_cost, peak, config.train.log_every)
    batches = run.loader.steps(PlanState())
    metrics = one_step(engine, next(batches), 1, meter, run)
    batches.close()
    return metrics


def save_checkpoint(
    ranks: Ranks, corpus: Path, folder: Path, overrides: list[str]
) -> dict[str, np.ndarray]:
    """Train two steps and save; returns all parameters."""
    config = tiny_config(corpus, *overrides)
    run = Run(config, ranks)
    engine = build_engine(config, run.tokenizer, ranks)
    meter = StepMeter(config.data.tokens.sides, config.data.pack.max_tokens, ranks)
    batches = run.loader.steps(PlanState())
    for step in (1, 2):
        meter.start()
        one_step(engine, next(batches), step, meter, run)
    batches.close()
    with checkpoint.Saver(folder, config.checkpoint, ranks) as saver:
        saver.save(engine, checkpoint.Progress(2), run.fingerprints, wait=True)
    return full_parameters(engine)


def start_from(
    ranks: Ranks, corpus: Path, folder: Path, overrides: list[str]
) -> tuple[dict[str, np.ndarray], float]:
    """All parameters of a new run after `checkpoint.init_from`, and its first loss."""
    config = tiny_config(corpus, "seed=5", *overrides)
    run = Run(config, ranks)
    engine = build_engine(config, run.tokenizer, ranks)
    path = checkpoint.checkpoints_at(folder)[0]
    engine.load_weights(path, checkpoint.read_manifest(path).world_size)
    meter = StepMeter(config.data.tokens.sides, config.data.pack.max_tokens, ranks)
    parameters = full_parameters(engine)
    batches = run.loader.steps(PlanState())
    loss = one_step(engine, next(batches), 1, meter, run)["loss"]
    batches.close()
    return parameters, loss


def modes(ranks: Ranks, corpus: Path, overrides: list[str]) -> bool:
    """Whether every module of a fresh engine is in training mode."""
    config = tiny_config(corpus, *overrides)
    engine = build_engine(config, Run(config, ranks).tokenizer, ranks)
    return all(module.training for module in engine.module.modules())


def nan_step(ranks: Ranks, corpus: Path) -> tuple[str, bool]:
    """A step whose loss is NaN on rank 1: the error's text, and whether the weights stayed."""
    config = tiny_config(corpus)
    run = Run(config, ranks)
    engine = build_engine(config, run.tokenizer, ranks)
    before = full_parameters(engine)
    batches = run.loader.steps(PlanState())
    batch = next(batches)
    batches.close()
    if ranks.rank == 1:
        batch.packs[0].loss_weights[batch.packs[0].loss_weights > 0] = torch.nan
    meter = StepMeter(config.data.tokens.sides, config.data.pack.max_tokens, ranks)
    message = ""
    try:
        one_step(engine, batch, 1, meter, run)
    except ValueError as error:
        message = str(error)
    after = full_parameters(engine)
    return message, all(np.array_equal(before[name], after[name]) for name in before)
