"""Command line: statistics of a run's plan (`plan`), or of made-up samples' (`simulate`)."""

import argparse
from collections.abc import Sequence

from data_pipeline.cli import command_parser, run_cli
from data_pipeline.stats import plan_statistics, simulation

_COMMANDS = {
    "plan": (plan_statistics, "plan as training with a config does, and print statistics"),
    "simulate": (simulation, "plan samples of given lengths, and compare with simpler packers"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; InputError for everything the user can set right."""
    described = "\n".join(f"{name:<10}{text}" for name, (_, text) in _COMMANDS.items())
    parser = command_parser("data_pipeline.stats", described)
    parser.epilog = f"{parser.prog} COMMAND --help says more."
    parser.add_argument("command", choices=_COMMANDS)
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...")
    chosen = parser.parse_args(arguments)
    module, text = _COMMANDS[chosen.command]
    # A parser of its own: a subparser takes no settings behind its options.
    own = argparse.ArgumentParser(prog=f"{parser.prog} {chosen.command}", description=text)
    module.add_arguments(own)
    module.run(own.parse_intermixed_args(chosen.rest))


if __name__ == "__main__":
    run_cli(main)
