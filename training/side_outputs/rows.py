"""Files of one JSON object per line: strict JSON, and readers that pass over what is broken."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from training.side_outputs.console import warn
from training.side_outputs.side_files import SideFiles

Row = dict[str, Any]
NOT_FINITE = "not_finite"
"""The key that names the values of an object that JSON has no number for: they are null."""
ASIDE = ".broken"


def encode_row(row: Row) -> bytes:
    """One line; {"loss": nan} becomes {"loss": null, "not_finite": {"loss": "nan"}}."""
    return json.dumps(_strict(row), allow_nan=False, default=str).encode() + b"\n"


def _strict(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [None if _odd(item) else _strict(item) for item in value]
    if not isinstance(value, dict):
        return value
    odd = {key: str(item) for key, item in value.items() if _odd(item)}
    strict = {key: None if key in odd else _strict(item) for key, item in value.items()}
    return strict | ({NOT_FINITE: odd} if odd else {})


def _odd(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _restore(found: Row) -> Row:
    odd = found.pop(NOT_FINITE, None)
    return found | {key: float(text) for key, text in odd.items()} if odd else found


def read_rows(path: Path) -> list[Row]:
    """The objects of a file in order, with the numbers that were not finite; [] without a file."""
    return [row for _, row in _lines(path) if isinstance(row, dict)]


def keep_rows(path: Path, keep: Callable[[Row], bool], files: SideFiles) -> None:
    """Take out of a file the rows that will come again; all else stays byte for byte.

    A line that is no JSON, as a crash or a bad disk leaves it, is set aside and named.
    """
    kept, changed = [], False
    for number, (line, row) in enumerate(_lines(path), start=1):
        if row is None:
            aside = path.with_name(path.name + ASIDE)
            warn(f"{path}, line {number}, is not JSON: {line[:60]!r}; set aside in {aside.name}")
            files.append(aside, line.rstrip(b"\n") + b"\n")
        if row is None or (isinstance(row, dict) and not keep(row)):
            changed = True
        else:
            changed |= not line.endswith(b"\n")
            kept.append(line.rstrip(b"\n") + b"\n")
    if changed:
        files.replace(path, b"".join(kept))


def _lines(path: Path) -> Iterator[tuple[bytes, Any]]:
    """Each line with what it holds: None where it is broken, as is `null`, which nobody writes."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    except OSError as error:
        warn(f"{path} cannot be read: {error.strerror}")
        return
    for line in content.splitlines(keepends=True):
        if line.strip():
            yield line, _parse(line)


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line, object_hook=_restore)
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
