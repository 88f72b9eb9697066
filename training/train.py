"""Train a flexible-token VLM with ZeRO-3 on packed webdataset shards.

    python -m training.train training/configs/digits.yaml train.steps=200          # one process
    torchrun --nproc-per-node 2 -m training.train training/configs/digits.yaml     # two

Also runs under the deepspeed launcher and as direct srun tasks (slurm/pretrain.sh). Settings are
`key=value` overrides of the YAML file; `training/config.py` lists them. Resumes from the newest
checkpoint of `output_dir` unless checkpoint.resume=never.
"""

import argparse
import sys
from functools import partial

if not __package__:  # Python would look for the other packages in training/
    print("error: start it as a module, from the root: python -m training.train", file=sys.stderr)
    sys.exit(2)

import torch.distributed

from data_pipeline.errors import InputError
from data_pipeline.storage import StoreOutage
from training import checkpoint, exit_codes
from training.config import RunConfig, load_config
from training.distributed import Ranks, StoppedError, from_main, rank_from_environment
from training.engine_interface import Engine
from training.estimate.dry_run import dry_run
from training.evaluate.in_training import Evaluation
from training.flops import peak_flops
from training.health import Monitor, StopRequest
from training.metrics import Loggers, MetricsLog, StepMeter, check_loggers
from training.precision import settle_precision
from training.profiling import explain_out_of_memory
from training.run import Run
from training.speed import check_machine, check_settings
from training.start import start
from training.step import shared_denominator, train_step
from training.zero3.extra import check_extra
from training.zero3.process_group import init_distributed, quiet_libraries


def train(config: RunConfig, ranks: Ranks, stop: StopRequest | None = None) -> int:
    """Run, or go on with, the training that the config describes; evaluate it at the end.

    Returns an exit code: a run that was asked to stop has saved, and can be started again.
    """
    config = settle_precision(config, ranks)
    check_machine(config, ranks)
    # The saver first: it locks the folder that the monitor writes to.
    with (
        explain_out_of_memory(config, ranks),
        checkpoint.Saver(config.output_dir / "checkpoints", config.checkpoint, ranks) as saver,
        Monitor(config, ranks, stop) as monitor,
    ):
        return _train(Run(config, ranks, monitor.files), saver, monitor)


def _train(run: Run, saver: checkpoint.Saver, monitor: Monitor) -> int:
    """The loop; its side jobs are calls."""
    engine, progress = start(run, saver, monitor)
    config, ranks = run.config, run.ranks
    first, last = progress.step, config.train.steps
    loggers = partial(Loggers, config, first, run.files)
    log = MetricsLog(config.output_dir, ranks, last, first, run.files, loggers)
    saver.compare(log.evaluations, run.files)
    data = config.data
    meter = StepMeter(
        data.tokens.sides,
        data.pack.max_tokens,
        ranks,
        run.mixture.names,
        run.pack_cost,
        peak_flops(ranks.device, config.train.precision),
        config.train.log_every,
        config.consistency_weight is not None,
    )
    batches = run.loader.steps(progress.plan, monitor.stop)
    monitor.ready(first)
    if run.evaluates_at(first) and from_main(lambda: first not in log.evaluations):
        evaluate(run, engine, first, log, saver, monitor)  # what a signal or crash left undone
    for step in range(first + 1, last + 1):
        monitor.step_begins(step)
        meter.start()
        with monitor.phase("data_wait"):
            batch = next(batches, None)  # None: asked to stop while waiting
        denominator = shared_denominator(batch, monitor.stop.requested, ranks)
        if batch is None or denominator is None:
            break
        run.name_left_out(batch.plan.left_out)
        run.name_bad_samples(batch.packs)
        metrics = train_step(engine, batch, denominator, step, meter, run, monitor.guard)
        progress = checkpoint.Progress(step, batch.state)
        monitor.step_done(step)
        log.write(step, metrics, show=step == last or step % config.train.log_every == 0)
        if step == last or step % config.checkpoint.every_steps == 0:
            with monitor.phase("checkpoint_stall"):
                saver.save(engine, progress, run.fingerprints, wait=step == last)
        if run.evaluates_at(step):
            evaluate(run, engine, step, log, saver, monitor)
    batches.close()
    result = None
    ended = progress.step < last and not monitor.stop.agree(ranks.device)
    if ended:
        run.data_ended(progress.step, progress.plan)
    if progress.step == last or ended:
        result = evaluate(run, engine, progress.step, log, saver, monitor)
    stopping = monitor.stop.agree(ranks.device)
    with monitor.phase("checkpoint_stall"):
        if (stopping or ended) and progress.step > first:
            saver.save(engine, progress, run.fingerprints, wait=True)
        saved = saver.wait()
    log.close()
    if stopping:
        run.say(f"asked to stop after step {progress.step}; the newest checkpoint is {saved}")
        monitor.outcome = "preempted"
        return exit_codes.PREEMPTED
    run.finish(result, saved, checkpoint.best(saver.folder))
    return exit_codes.OK


def evaluate(
    run: Run,
    engine: Engine,
    step: int,
    log: MetricsLog,
    saver: checkpoint.Saver,
    monitor: Monitor,
) -> Evaluation | None:
    """Evaluate as `Run.evaluate`, and let the saver know how good this step is."""
    with monitor.phase("evaluation"):
        result = run.evaluate(engine, step, log, monitor.between_batches())
    saver.compare(log.evaluations, run.files)
    return result


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m training.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="YAML file, for example training/configs/digits.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything and estimate, without training"
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(
            f"settings are key=value without dashes, as train.steps=200: {' '.join(unknown)}"
        )
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    quiet_libraries()
    try:
        config = load_config(args.config, args.overrides)
        check_extra(config)
        check_loggers(config)
        check_settings(config)
        if args.dry_run:
            if rank_from_environment()[0] == 0:
                dry_run(config)
            return exit_codes.OK
        with StopRequest() as stop:
            on_cpu = config.train.device == "cpu"
            ranks = init_distributed(config.faults.startup_timeout_s, on_cpu, stop)
            code = train(config, ranks, stop)
    except InputError as error:
        # Every rank says so: another may end the job before rank 0 has come this far.
        print(f"error: {error}", file=sys.stderr, flush=True)
        outage = isinstance(error, StoreOutage)  # starting again may help
        return exit_codes.CRASH if outage else exit_codes.BAD_INPUT
    except StoppedError as error:
        print(error, file=sys.stderr, flush=True)
        return exit_codes.PREEMPTED
    if code == exit_codes.OK:  # else a rank may wait for one that hangs
        torch.distributed.destroy_process_group()
    return code


if __name__ == "__main__":
    exit_codes.run_rank(main)
