"""Command line: write the page."""

import argparse
from collections.abc import Sequence

from data_pipeline.cli import add_config_arguments, at_least, command_parser, run_cli
from data_pipeline.corpus import open_config
from data_pipeline.errors import InputError
from data_pipeline.files import write_atomically
from data_pipeline.inspect.inspection import InspectSettings, inspect_plan
from data_pipeline.inspect.page import render
from data_pipeline.paths import path_argument

_DESCRIPTION = """\
Write an HTML page that shows what the model will see in training: samples with
their tiles, tokens and labels, packs with their balance, and what is left out.
Plans as training does, builds a few packs, trains nothing. The page is one file
without scripts; nothing in it is loaded from elsewhere.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; InputError for everything the user can set right."""
    options = _parse(arguments)
    if options.out.is_dir():
        raise InputError(f"--out {options.out} is a folder; name a file, such as report.html")
    config, corpus = open_config(options.config, options.overrides)
    settings = InspectSettings(options.first_step, options.steps, options.packs, options.samples)
    report = inspect_plan(config, corpus, settings)
    page = render(report, " ".join([options.config, *options.overrides]))
    data = page.encode(errors="backslashreplace")
    try:
        write_atomically(options.out, data)
    except OSError as error:
        raise InputError(f"cannot write {options.out}: {error.strerror}") from error
    numbers = [step.number for step in report.steps]
    print(
        f"steps {numbers[0]} to {numbers[-1]}, {len(report.samples)} samples, "
        f"{len(report.failed)} of {report.built} could not be built"
    )
    print(f"page: {options.out} ({len(data) / 1e6:.1f} MB)")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    defaults = InspectSettings()
    parser = command_parser("data_pipeline.inspect", _DESCRIPTION)
    add_config_arguments(parser)
    parser.add_argument("--out", type=path_argument, required=True, metavar="PAGE.html")
    numbers = {
        "--steps": "steps whose packs are shown",
        "--first-step": "first of them, counted from 1 as training does",
        "--packs": "packs shown of each step, at most",
        "--samples": "samples shown with their content",
    }
    for option, text in numbers.items():
        default = getattr(defaults, option[2:].replace("-", "_"))
        parser.add_argument(
            *(option,), type=at_least(1), default=default, metavar="N", help=f"{text} ({default})"
        )
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    run_cli(main)
