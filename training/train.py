"""Train a flexible-token VLM with DeepSpeed ZeRO-3 on packed webdataset shards.

    python -m training.train training/configs/digits.yaml train.steps=200          # one process
    torchrun --nproc-per-node 2 -m training.train training/configs/digits.yaml     # two

Also runs under the deepspeed launcher and as direct srun tasks (slurm/pretrain.sh). Settings are
`key=value` overrides of the YAML file; `training/config.py` lists them. Resumes from the newest
checkpoint of `output_dir` unless checkpoint.resume=never.
"""

import argparse
import logging
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import torch.distributed

from data_pipeline.errors import InputError
from data_pipeline.loader import StepBatch
from training import checkpoint
from training.config import RunConfig, load_config
from training.distributed import Ranks, all_reduce_sum, from_main, init_distributed
from training.engine import build_engine
from training.inputs import model_inputs
from training.metrics import MetricsLog, StepMeter, weight_sum
from training.precision import settle_precision
from training.run import Run
from training.stages import learning_rate_factor


def train(config: RunConfig, ranks: Ranks) -> None:
    """Run, or go on with, the training that the config describes; evaluate it at the end."""
    config = settle_precision(config, ranks)
    run = Run(config, ranks)
    folder, earlier = config.output_dir / "checkpoints", config.checkpoint.init_from
    # Decided by one rank: on a shared file system others may not see the newest folder yet.
    saved = from_main(lambda: checkpoint.find(config.checkpoint.resume, folder))
    engine = build_engine(config, run.tokenizer, ranks, pretrained=not (saved or earlier))
    progress = checkpoint.Progress()
    if saved:
        progress = checkpoint.load(engine, saved, run.fingerprints)
        run.say(f"resumed from {saved} at step {progress.step}")
    elif earlier:
        run.say(f"weights from {checkpoint.start_from(engine, Path(earlier))}")
    from_main(lambda: checkpoint.refuse_later(folder, progress.step))
    run.announce(engine)
    log = MetricsLog(config.output_dir, ranks, config.train.steps, progress.step)
    meter = StepMeter(config.data.tokens.sides, config.data.pack.max_tokens, ranks)
    batches = run.loader.steps(progress.plan)
    for step in range(progress.step + 1, config.train.steps + 1):
        meter.start()
        batch = next(batches)
        run.name_bad_samples(batch.packs)
        metrics = train_step(engine, batch, step, meter, run)
        progress = checkpoint.Progress(step, batch.state)
        last = step == config.train.steps
        log.write(step, metrics, show=last or step % config.train.log_every == 0)
        if last or step % config.checkpoint.every_steps == 0:
            keep = config.checkpoint.keep
            saved = checkpoint.save(engine, folder, progress, run.fingerprints, keep)
        if not last and config.eval.every_steps and step % config.eval.every_steps == 0:
            run.evaluate(engine, step, log)
    batches.close()
    result = run.evaluate(engine, progress.step, log)
    log.close()
    run.finish(result, saved)


def train_step(
    engine: Any, batch: StepBatch, step: int, meter: StepMeter, run: Run
) -> dict[str, float]:
    """One optimizer step over this rank's packs; returns the metrics of all ranks.

    The loss has one denominator per step, the sum of loss weights over all ranks and packs, so
    that it does not depend on how packs are shared out.
    """
    device, settings = run.ranks.device, run.config.train
    denominator = all_reduce_sum([weight_sum(batch)], device)[0] or 1.0
    # DeepSpeed averages gradients over ranks; the loss is a sum.
    scale = run.ranks.world_size / denominator
    factor = learning_rate_factor(step - 1, settings)
    for group in engine.optimizer.param_groups:
        group["lr"] = factor * group["peak_lr"]
    for number, pack in enumerate(batch.packs, start=1):
        output = engine(**model_inputs(pack, device, run.loss_chunks))
        engine.backward(output.loss * scale, scale_wrt_gas=False)
        meter.add(pack, output.token_losses)
        if number == len(batch.packs):
            metrics = meter.reduce()
            stop_if_not_finite("loss", metrics["loss"], batch, step, run)
        engine.step()
    # DeepSpeed has skipped the update if the norm is not finite.
    norm = float(engine.get_global_grad_norm())
    stop_if_not_finite("gradient norm", norm, batch, step, run)
    peak = max(group["peak_lr"] for group in engine.optimizer.param_groups)
    metrics |= {"lr": factor * peak, "grad_norm": norm}
    return metrics | {"epoch": batch.epoch} | meter.timing(metrics, batch.wait_s)


def stop_if_not_finite(name: str, value: float, batch: StepBatch, step: int, run: Run) -> None:
    """Stop every rank before a NaN or infinite loss or gradient spoils the weights."""
    if math.isfinite(value):
        return
    ids = [sample for pack in batch.packs for sample in pack.sample_ids]
    everyone: list[Any] = [None] * run.ranks.world_size
    torch.distributed.all_gather_object(everyone, ids)
    names = [run.index.name(sample) for ids in everyone for sample in ids]
    raise InputError(
        f"the {name} of step {step} is {value}; the weights are those of step {step - 1}. Samples "
        f"of the step: {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}. Lower "
        "train.modules.*.lr or inspect these samples"
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m training.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="YAML file, for example training/configs/digits.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    return parser.parse_args(argv)


def quiet_libraries() -> None:
    """Hide start-up chatter of the libraries, not their errors."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*(all_gather_into_tensor|reduce_scatter).*")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    quiet_libraries()
    try:
        config = load_config(args.config, args.overrides)
        train(config, init_distributed())
    except InputError as error:
        # Every rank says so: another may end the job before rank 0 has come this far.
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
