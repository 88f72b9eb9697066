"""Paths as a shell would read them, where none did: in a YAML file, or behind `--out=`."""

import argparse
import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

_VARIABLE = re.compile(r"\$(?:\{([A-Za-z_]\w*)\}|([A-Za-z_]\w*))")


def expand_path(text: str) -> str:
    """A path, pattern or URL with `~`, `$NAME` and `${NAME}` replaced by what they stand for.

    Raises:
        ValueError: it is empty, a variable is not set, or a user is not known.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in os.environ:
            raise ValueError(
                f"{text} names the environment variable {name}, which is not set; set it, or "
                "write the path out"
            )
        return os.environ[name]

    if not text.strip():
        raise ValueError("expected a path, found an empty text")
    # Not Path.expanduser: a URL keeps its two slashes.
    expanded = os.path.expanduser(_VARIABLE.sub(value, text))  # noqa: PTH111
    if expanded.startswith("~") and text.startswith("~"):
        raise ValueError(
            f"{text} names the home of a user who is not known here; write ./{text} for a folder "
            "of that name"
        )
    return expanded


PathText = Annotated[str, AfterValidator(expand_path)]
"""A setting that is a path, a pattern, a URL or a name."""


def _file_path(path: Any) -> Any:
    return expand_path(path) if isinstance(path, str) else path


FilePath = Annotated[Path, BeforeValidator(_file_path)]
"""A setting that is a local path."""


def path_text(text: str) -> str:
    """A type for argparse: a path, a pattern, a URL or a name."""
    try:
        return expand_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def path_argument(text: str) -> Path:
    """A type for argparse: a local path."""
    return Path(path_text(text))
