"""Words to people that never end a run, wherever its output goes: a full disk, a closed pipe."""

import contextlib
import io
import os
import sys
from collections.abc import Callable
from typing import Any

from tqdm import tqdm


def warn(text: str) -> None:
    """Print a warning on this rank, above a progress bar."""
    tqdm.write(f"warning: {text}", file=sys.stderr)


def attempt(what: str, job: Callable[[], object]) -> None:
    """Do what no result depends on; should it fail, say so and go on."""
    try:
        job()
    except Exception as error:  # whatever it is: a picture must not end a run
        warn(f"{what}: {error}")


def shout(text: str) -> None:
    """Write to stderr at once, from a signal handler or beside a thread that hangs."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


class _UnfailingFile(io.FileIO):
    """Takes everything; what the system refuses is gone."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def unfailing_console() -> None:
    """From now on `print` and tracebacks of this process cannot fail, and lines come at once."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        try:
            raw = _UnfailingFile(stream.fileno(), "w", closefd=False)
        except (AttributeError, OSError, ValueError):  # closed, or no file
            continue
        text = io.TextIOWrapper(
            io.BufferedWriter(raw),
            encoding=stream.encoding,
            errors="backslashreplace",
            line_buffering=True,  # a file is read while the run goes on, and its last lines count
            write_through=stream.write_through,
        )
        setattr(sys, name, text)
