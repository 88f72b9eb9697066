"""One page of a run, finished or still going, or of several side by side.

    python -m training.report runs/digits                        # runs/digits/report.html
    python -m training.report runs/digits --samples 12           # also answers to held-out samples
    python -m training.report runs/digits runs/other --out compare.html

The page holds losses by token count and data set, evaluations, throughput and what a step's time
went into, padding and balance, goodput and faults, checkpoints, traced phases, the machine and the
settings. It needs no server and loads nothing from elsewhere. TensorBoard has the same scalars.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.cli import at_least, command_parser, run_cli
from data_pipeline.errors import InputError
from data_pipeline.files import write_atomically
from data_pipeline.paths import path_argument
from training.report.report_page import render
from training.report.run_facts import read_facts
from training.report.sample_answers import read_answers

_MOST_RUNS = 8


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; InputError for what the user can set right."""
    options = _parse(arguments)
    if len(options.runs) > _MOST_RUNS:
        raise InputError(f"{len(options.runs)} runs were given; {_MOST_RUNS} fit on a page")
    facts = [read_facts(run) for run in options.runs]
    for run in facts if options.samples else []:
        run.samples = read_answers(run.folder, options.samples)
    out: Path = options.out or options.runs[0] / "report.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, render(facts).encode())
    print(f"report: {out}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("training.report", __doc__)
    parser.add_argument(
        "runs", type=path_argument, nargs="+", metavar="RUN", help="output_dir of a run"
    )
    parser.add_argument(
        "--out", type=path_argument, metavar="FILE.html", help="default: report.html in the run"
    )
    parser.add_argument(
        "--samples",
        type=at_least(1),
        metavar="N",
        help="also show so many held-out samples, with the newest checkpoint's answers at every "
        "trained token count; it is exported to a temporary folder for that",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_cli(main)
