"""One optimizer step over all ranks: the loss's one denominator, the gradients, the update."""

from data_pipeline.errors import InputError
from data_pipeline.loader import StepBatch
from training.distributed import Ranks, all_reduce_sum, gather
from training.engine_interface import Engine
from training.health import LossGuard, Verdict
from training.health.loss_guard import SKIPPED
from training.metrics import StepMeter, weight_sum
from training.model.pack_inputs import model_inputs
from training.profiling import phase
from training.run import Run


def shared_denominator(batch: StepBatch | None, stop: bool, ranks: Ranks) -> float | None:
    """Sum of the loss weights over all ranks; None if any of them was asked to stop.

    One collective for both: a rank that left without the others would leave them waiting.
    """
    own = weight_sum(batch) if batch else 0.0
    weights, stops = all_reduce_sum([own, float(stop or batch is None)], ranks.device)
    return None if stops else weights or 1.0


def train_step(
    engine: Engine,
    batch: StepBatch,
    denominator: float,
    step: int,
    meter: StepMeter,
    run: Run,
    guard: LossGuard,
) -> dict[str, float]:
    """One optimizer step over this rank's packs; returns the metrics of all ranks.

    The loss has one denominator per step, the sum of loss weights over all ranks and packs, so
    that it does not depend on how packs are shared out.
    """
    # The engine averages gradients over ranks; the loss is a sum.
    scale = run.ranks.world_size / denominator
    factor = run.schedule.factor(step - 1)
    for group in engine.param_groups:
        group["lr"] = factor * group["peak_lr"]
    for number, pack in enumerate(batch.packs, start=1):
        moved = run.copies.take(pack)
        if number < len(batch.packs):
            run.copies.begin(batch.packs[number])
        weight = run.config.consistency_weight
        inputs = model_inputs(pack, run.ranks.device, run.loss_chunks, weight, moved)
        output = engine(**inputs)
        with phase("backward"):
            engine.backward(output.loss * scale, last=number == len(batch.packs))
        meter.add(pack, output.token_losses, output.divergences)
    run.copies.begin(batch.following())
    meter.counts["store_retries"] = batch.store_retries
    with phase("metrics"):  # here the host waits for the GPU
        metrics = meter.reduce()
    with phase("optimizer"):
        verdict = guard.update(engine, metrics["loss"])
    if verdict.fault:
        report_fault(verdict, batch, step, run)
    if spike := guard.spike(metrics["loss"]):
        run.say(f"warning: step {step}: {spike}; its samples: {sample_names(batch, run)}")
    peak = max(group["peak_lr"] for group in engine.param_groups)
    metrics |= {"lr": factor * peak, "grad_norm": verdict.norm, SKIPPED: guard.skipped}
    epochs = dict(zip(run.mixture.names, batch.plan.epochs, strict=True))
    metrics |= {"epoch": batch.plan.epoch, "too_long": len(batch.plan.left_out)}
    if len(epochs) > 1:
        metrics |= {f"epoch_{name}": epoch for name, epoch in epochs.items()}
    return metrics | meter.timing(metrics, batch.wait_s)


def report_fault(verdict: Verdict, batch: StepBatch, step: int, run: Run) -> None:
    """Name the samples of a step that was left out; InputError if no more may be (all ranks)."""
    text = f"{verdict.fault} in step {step}, which changed no weight; its samples: "
    text += sample_names(batch, run)
    if verdict.stop:
        raise InputError(
            f"{text}. Inspect them, lower train.modules.*.lr, or leave such steps out: "
            f"faults.max_skipped_steps is {run.config.faults.max_skipped_steps}"
        )
    run.say(f"warning: {text}")


def sample_names(batch: StepBatch, run: Run) -> str:
    """The first samples of the step over all ranks, as shard:key (all ranks must call this)."""
    ids = [sample for pack in batch.packs for sample in pack.sample_ids]
    different = dict.fromkeys(sample for ids in gather(ids) for sample in ids)
    names = [run.mixture.name(sample) for sample in different]
    return f"{', '.join(names[:20])}{', ...' if len(names) > 20 else ''}"
