"""Train arms that differ in their token counts, alike in all else, and compare them.

    python -m training.experiments.flexibility CONFIG.yaml --jobs 2    # two runs side by side
    python -m training.experiments.flexibility CONFIG.yaml --list
    python -m training.experiments.flexibility CONFIG.yaml --run 3     # one run, for a job array
    slurm/flexibility.sh CONFIG.yaml                                   # all of them as job arrays

Experiments are in training/configs/experiments/.

Every arm runs with every seed, from the same weights and in the same order of samples: at equal
samples, with as many tokens in a pack as give all arms the same steps, and, where `budget` names an
arm, once more for as many steps as cost what that one did. Each run is the trainer's, evaluated
at all counts. The same command goes on with what is not done: a run that was ended resumes at its
newest checkpoint. At the end, or with --report from what there is: tables with 95 % intervals over
the seeds, pictures, what each arm spent, and which of the paper's claims held.

Exit status: 0 when all runs are done, 1 when one failed, 2 for a wrong setting, 75 after a signal.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.cli import at_least, command_parser
from data_pipeline.errors import InputError
from data_pipeline.files import write_atomically
from data_pipeline.paths import path_argument
from training import exit_codes
from training.config import load_config
from training.experiments.flexibility.equal_packs import answer_gflop
from training.experiments.flexibility.experiment_runs import ExperimentRuns
from training.experiments.flexibility.experiment_settings import (
    ArmRun,
    ExperimentSettings,
    load_experiment,
)
from training.experiments.flexibility.flexibility_plots import plot_record
from training.experiments.flexibility.flexibility_record import finished, make_record
from training.experiments.flexibility.flexibility_tables import markdown
from training.experiments.flexibility.interleaved_timing import time_arms
from training.health import StopRequest
from training.run import prepare_corpus


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_parser("training.experiments.flexibility", __doc__)
    parser.add_argument("config", type=path_argument, metavar="CONFIG.yaml")
    parser.add_argument(
        "--jobs", type=at_least(1), default=1, metavar="N", help="runs side by side (1)"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="show the runs and end")
    what.add_argument("--run", type=at_least(0), metavar="I", help="only this one of the list")
    what.add_argument("--report", action="store_true", help="run nothing, compare what is done")
    parser.add_argument(
        "--out",
        type=path_argument,
        metavar="DIR",
        help="of the runs, instead of the config's `out`",
    )
    parser.add_argument(
        "--record", type=path_argument, metavar="FILE", help="default: flexibility.json in `out`"
    )
    parser.add_argument(
        "--images", type=path_argument, metavar="DIR", help="for the pictures (default: `out`)"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        experiment = load_experiment(args.config)
        if args.out:
            experiment = experiment.model_copy(update={"out": args.out})
        base = load_config(experiment.base, experiment.settings)
        if not base.data.eval_shards:
            raise InputError(f"{experiment.base} has no data.eval_shards to compare the arms on")
        if base.data.prepare:
            prepare_corpus(base.data)
        with StopRequest() as stop:
            return _act(args, experiment, ExperimentRuns(experiment, stop), stop)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_codes.BAD_INPUT


def _act(
    args: argparse.Namespace,
    experiment: ExperimentSettings,
    runs: ExperimentRuns,
    stop: StopRequest,
) -> int:
    if args.list:
        for number, run in enumerate(experiment.runs):
            print(f"{number:3}  {'done' if runs.result(run) else '    '}  {run}")
        return exit_codes.OK
    if not args.report:
        failures = runs.run_all(_chosen(experiment, args.run), args.jobs)
        for failure in failures:
            print(f"error: {failure}", file=sys.stderr)
        if failures:
            return exit_codes.CRASH
    if stop.requested:
        return exit_codes.PREEMPTED
    if args.run is None:
        _report(args, experiment, runs)
    return exit_codes.PREEMPTED if stop.requested else exit_codes.OK


def _chosen(experiment: ExperimentSettings, number: int | None) -> list[ArmRun]:
    if number is None:
        return experiment.runs
    if number >= len(experiment.runs):
        raise InputError(f"--run {number}: expected 0 to {len(experiment.runs) - 1} (--list)")
    return [experiment.runs[number]]


def _report(args: argparse.Namespace, experiment: ExperimentSettings, runs: ExperimentRuns) -> None:
    """Write record, table and pictures of what is done, and say it."""
    results = finished(runs)
    if not results:
        raise InputError(f"{experiment.out} has no finished run to compare; leave --report out")
    rounds = time_arms(runs, measure=not args.report)
    command = shlex.join(["python", "-m", "training.experiments.flexibility", str(args.config)])
    record = make_record(experiment, results, rounds, answer_gflop(experiment), command)
    path: Path = args.record or experiment.out / "flexibility.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(record, indent=1).encode() + b"\n")
    text = markdown(record)
    write_atomically(experiment.out / "tables.md", text.encode())
    print(f"\n{text}")
    if not record["complete"]:
        print(f"{len(results)} of {len(experiment.runs)} runs are done")
    for picture in plot_record(record, args.images or experiment.out):
        print(f"picture  {picture}")
    print(f"record   {path}")


if __name__ == "__main__":
    sys.exit(main())
