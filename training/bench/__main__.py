"""Measure this trainer against padded batches and against other trainers, in one go.

    python -m training.bench                                   # about fifteen minutes of two cores
    python -m training.bench --arms packed,transformers --rounds 1 --out runs/look.json
    python -m training.bench model.llm.config.num_hidden_layers=6 --work runs/deeper

All arms train the same samples once, from the same weights, with the same optimizer and precision,
on the CPU, in two processes of a thread each:

packed        this trainer, by training.train
padded        its model and engine on padded batches of the same steps
grouped       the same on batches of samples of like length
transformers  transformers' Trainer on the exported model and processor: grouped by length, DDP,
              worker processes that stay
trl           TRL's SFTTrainer likewise, where it is installed (make extras)

They take turns, round after round. Finished runs are kept in --work: the same command goes on with
those that are missing, more --rounds add to them. Written are a JSON with command, machine and
versions, a picture, and a table.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from data_pipeline.cli import at_least, command_parser, run_cli
from data_pipeline.errors import InputError
from data_pipeline.files import write_atomically
from data_pipeline.machine import measured_on
from data_pipeline.paths import path_argument
from training.bench.arms import ARMS, chosen_arms
from training.bench.bench_workload import BenchWorkload
from training.bench.comparison_plot import plot
from training.bench.comparison_table import compare, table
from training.bench.loss_memory import loss_memory
from training.bench.rounds import run_rounds
from training.record.run_record import PACKAGES

_SUPERVISED = (1.0, 0.3)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("training.bench", __doc__)
    add, count = parser.add_argument, at_least(1)
    add("overrides", nargs="*", metavar="key=value", help="settings of the run to change")
    add("--arms", metavar="ARM,..", help=f"of {', '.join(ARMS)} (default: all that are installed)")
    add("--rounds", type=count, default=3, help="(default: %(default)s)")
    add("--steps", type=count, default=20, help="of a run, about (default: %(default)s)")
    add("--samples-per-step", type=count, default=24, help="about (default: %(default)s)")
    add("--ranks", type=count, default=2, help="processes (default: %(default)s)")
    # Grouping by length puts the longest batch first: without it others would seem faster.
    add("--warmup", type=at_least(0), default=0, help="first steps not timed (%(default)s)")
    add("--workers", type=at_least(0), default=1, help="worker processes a rank (%(default)s)")
    add("--work", type=path_argument, default=Path("runs/bench"), help="folder (%(default)s)")
    add("--out", type=path_argument, default=Path("runs/bench.json"), help="(%(default)s)")
    add("--plot", type=path_argument, help="picture (default: beside --out)")
    args = parser.parse_intermixed_args(argv)
    if args.warmup >= args.steps:
        parser.error(f"--warmup {args.warmup} leaves none of --steps {args.steps}")
    if args.samples_per_step % args.ranks:
        parser.error(f"--samples-per-step {args.samples_per_step}: --ranks must divide it")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Command-line entry point."""
    args = parse_args(argv)
    arms = chosen_arms(args.arms)
    if args.out.is_dir():
        raise InputError(f"--out {args.out} is a folder; name a file")
    # Plain integers: those of the parser are of a class of its own.
    workload = BenchWorkload(
        int(args.steps), int(args.samples_per_step), int(args.ranks), tuple(args.overrides)
    )
    workload.prepare(args.work)
    before = measured_on((*PACKAGES, "accelerate"))
    before["versions"] |= {arm.package: arm.version() for arm in arms if arm.package}
    runs = run_rounds(arms, args.rounds, workload, args.work, args.workers)
    found: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "training.bench", *(argv or sys.argv[1:])]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **before,
        "settings": vars(args) | {"work": None, "out": None, "plot": None},
        **compare(runs, args.warmup),
        "loss_memory": [loss_memory(share) for share in _SUPERVISED],
    }
    print(table(found))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out, json.dumps(found, indent=1).encode() + b"\n")
    picture = args.plot or args.out.with_suffix(".png")
    plot(found, picture)
    print(f"written to {args.out} and {picture}")


if __name__ == "__main__":
    run_cli(main)
