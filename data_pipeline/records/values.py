"""Values as people write them: what says nothing, what one key of several holds, lists as text."""

import ast
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipeline.errors import InputError

Present = Mapping[str, list[tuple[Any, Any]]]
"""The keys of an object that hold something; see `present`."""
_HOLDERS = (str, bytes, list, tuple, dict)


def is_absent(value: Any) -> bool:
    """Whether a value says that there is nothing: null, NaN, "", an empty list or object."""
    if isinstance(value, _HOLDERS):
        return not value
    return value is None or (isinstance(value, float) and math.isnan(value))


def describe(value: Any) -> str:
    """The kind of a value, for a message."""
    if value is None:
        return "null"
    return "empty" if is_absent(value) else f"of type {type(value).__name__}"


def present(record: Mapping[Any, Any]) -> Present:
    """Key in lower case -> (key, value) of all keys of that name that hold something."""
    held: dict[str, list[tuple[Any, Any]]] = {}
    for key, value in record.items():
        if not is_absent(value):
            held.setdefault(str(key).lower(), []).append((key, value))
    return held


def first_of(
    held: Present, names: Sequence[str], what: str, remedy: str = "--map"
) -> tuple[str, Any] | None:
    """(key, value) of the one of these keys that is there; None if none is.

    InputError, naming them, if several are; `remedy` is the option that says which is meant.
    """
    entries = [entry for name in held if name in names for entry in held[name]]
    if not entries:
        return None
    if len(entries) > 1:
        option = f", or say with {remedy} {names[0]}={entries[0][0]} which is meant"
        raise InputError(
            f"{' and '.join(repr(key) for key, _ in entries)} both hold {what}; leave one of them"
            f"{option if remedy else ''}"
        )
    return entries[0]


def structured(value: Any) -> Any:
    """A list or object that a cell of a table holds as text, in JSON or as Python prints it."""
    if not isinstance(value, str) or value.strip()[:1] not in ("[", "{"):
        return value
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(value.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return value


def only_of(value: Any) -> Any:
    """What a list of one holds; any other value as it is."""
    return value[0] if isinstance(value, list | tuple) and len(value) == 1 else value
