"""Print where a run's wall time went, over all its restarts, and how often to save.

    python -m training.goodput runs/digits
    python -m training.goodput runs/digits --failures-per-day 0.5

Reads RUN/goodput.jsonl and draws RUN/goodput.png. Parts: steps (that count), data wait, checkpoint
stall (what a save holds training up), evaluation, startup (until the first step), restart (from the
end of one process to the start of the next), lost (steps done again after a restart), other.
"""

import json

from data_pipeline.cli import command_parser, run_cli
from data_pipeline.errors import InputError
from data_pipeline.paths import path_argument
from training.goodput.accounting import summarize, table
from training.goodput.goodput_plot import plot


def main(argv: list[str] | None = None) -> None:
    parser = command_parser("training.goodput", __doc__)
    parser.add_argument("run", type=path_argument, metavar="RUN", help="output_dir of the run")
    rate = parser.add_mutually_exclusive_group()
    rate.add_argument("--failures-per-day", type=float, metavar="X", help="expected in this job")
    rate.add_argument("--mtbf-hours", type=float, metavar="H", help="mean hours between failures")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    summary = summarize(args.run, _mtbf_s(args.failures_per_day, args.mtbf_hours))
    plot(summary, args.run / "goodput.png")
    if args.json:
        print(json.dumps(summary.to_json(), indent=1))
    else:
        print(f"{table(summary)}\n\npicture: {args.run / 'goodput.png'}")


def _mtbf_s(per_day: float | None, hours: float | None) -> float | None:
    for name, value in (("--failures-per-day", per_day), ("--mtbf-hours", hours)):
        if value is not None and not value > 0:
            raise InputError(f"{name} is {value}; give a number above 0")
    if per_day is not None:
        return 86400 / per_day
    return None if hours is None else 3600 * hours


if __name__ == "__main__":
    run_cli(main)
