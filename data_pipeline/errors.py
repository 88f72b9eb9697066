"""The one error type meant for users, and how command-line tools print it."""

import sys
from collections.abc import Callable


class InputError(ValueError):
    """Something the user gave is wrong; the message says what was found, expected, and to do."""


def run_cli(main: Callable[[], object]) -> None:
    """Run a command-line tool; an `InputError` becomes one line on stderr and exit status 2."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
