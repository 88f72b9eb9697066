"""What the command lines have in common: errors as one line, options, arguments."""

import argparse
import sys
from collections.abc import Callable

from data_pipeline.errors import InputError
from data_pipeline.yaml_text import read_yaml


def run_cli(main: Callable[[], object]) -> None:
    """Run a command-line tool; an `InputError` becomes one line on stderr and exit status 2.

    So does a file or folder that cannot be read or written.
    """
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(2)


def command_parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of `python -m MODULE`, whose description is shown line by line as it stands."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """`options.config`, `options.overrides`: the config of a training run and changes to it."""
    parser.add_argument("config", metavar="CONFIG.yaml", help="the config of the training run")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings to change, as for training"
    )


def at_least(smallest: int) -> "type[int]":
    """A type for argparse: an integer from `smallest` on."""

    class Whole(int):
        def __new__(cls, text: str) -> "Whole":
            value = super().__new__(cls, text)
            if value < smallest:
                raise argparse.ArgumentTypeError(f"must be at least {smallest}, found {text}")
            return value

    Whole.__name__ = "integer"  # what argparse says is expected
    return Whole


def storage_option(text: str) -> tuple[str, object]:
    """A type for argparse: NAME=VALUE, the value as in YAML."""
    name, separator, value = text.partition("=")
    if not name or not separator:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, found {text}")
    try:
        return name, read_yaml(value, f"the value of {name}")
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def fraction(text: str) -> float:
    """A type for argparse: a number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, found {text}")
    return value
