"""The options of a multiple-choice sample: label -> text, from its metadata or its question."""

import re
import unicodedata
from collections.abc import Mapping
from string import ascii_uppercase
from typing import Any

from data_pipeline.errors import InputError
from data_pipeline.records.vocabulary import CHOICES

Options = Mapping[str, str]

NO_OPTIONS: Options = dict.fromkeys(ascii_uppercase, "")
"""Labels alone, where nothing says what they stand for."""

# One option a line; else options within a line.
_MARKERS = (
    r"^[ \t]*[(\[]?([A-Za-z])[)\].:、][ \t]*",
    r"(?<!\w)\(([A-Za-z])\)\s*",
    r"(?<![\w.])([A-Z])[.):、]\s*",
)


def options_of(metadata: Mapping[str, Any]) -> Options:
    """A sample's options by its metadata's "choices" or "options"; empty if it has none.

    Raises:
        InputError: the metadata hold something else there.
    """
    held = {key.lower(): value for key, value in metadata.items()}
    key = next((key for key in CHOICES if held.get(key)), None)
    if key is None:
        return {}
    given = options_in(held[key]) if isinstance(held[key], str) else held[key]
    if isinstance(given, list) and len(given) <= len(ascii_uppercase):
        given = dict(zip(ascii_uppercase, given, strict=False))
    valid = isinstance(given, Mapping) and all(
        isinstance(v, str | int | float) for v in given.values()
    )
    if not given or not valid:
        raise InputError(
            f'metadata "{key}" is {str(held[key])[:60]!r}, expected a list of at most 26 texts, an '
            'object of label -> text, or "A. ... B. ..."'
        )
    names = {str(label).strip(" ().:").upper(): str(text) for label, text in given.items()}
    return {
        label: re.sub(rf"^\(?{re.escape(label)}[).:]\s+", "", text) for label, text in names.items()
    }


def options_in(question: str) -> Options:
    """The last list A, B, ... in a question, each with what follows it up to the next one."""
    question = unicodedata.normalize("NFKC", question)
    for marker in _MARKERS:
        found: list[re.Match[str]] = []
        runs: list[list[re.Match[str]]] = []
        for match in re.finditer(marker, question, re.MULTILINE):
            label = match[1].upper()
            if label == "A":
                runs.append(found := [match])
            elif found and label == ascii_uppercase[len(found) % 26]:
                found.append(match)
        run = next((run for run in reversed(runs) if len(run) > 1), None)
        if run:
            line_end = question.find("\n", run[-1].end())
            ends = [m.start() for m in run[1:]] + [line_end if line_end >= 0 else len(question)]
            texts = (question[m.end() : end] for m, end in zip(run, ends, strict=True))
            return {m[1].upper(): text.strip(" \n\t,;") for m, text in zip(run, texts, strict=True)}
    return {}
