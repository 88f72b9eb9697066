"""The values of --model_args: numbers and words as lmms-eval reads them, or as text."""

import os
from argparse import ArgumentTypeError
from pathlib import Path
from typing import Any

from data_pipeline.cli import fraction
from data_pipeline.errors import InputError

RELEASED = "released"
"""In place of a number: by the task, as in `released_settings`."""


def whole_or_released(name: str, value: Any) -> Any:
    """A number, RELEASED or None."""
    return value if value in (None, RELEASED) else whole(name, value, f", or {RELEASED}")


def whole(name: str, value: Any, otherwise: str = "") -> int:
    """A number above 0; InputError for anything else, with what else may be given."""
    try:
        if float(value) == int(value) > 0:
            return int(value)
    except (TypeError, ValueError):
        pass
    raise InputError(f"{name} is {value!r}; give a whole number above 0{otherwise}")


def share(name: str, value: Any) -> float:
    """A number from 0 to 1; InputError for any other."""
    try:
        return fraction(str(value))
    except (ValueError, ArgumentTypeError):
        raise InputError(f"{name} is {value!r}; give a number from 0 to 1") from None


def text_or_file(text: Any) -> str | None:
    """The text, or that of the file it names: a comma ends what --model_args can hold."""
    if text is None:
        return None
    text = str(text)
    is_file = os.path.isfile(text)  # noqa: PTH113 - pathlib raises for a long text
    return Path(text).read_text(encoding="utf-8").strip() if is_file else text
