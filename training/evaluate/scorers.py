"""Scores in 0..1 of an answer, by the metric that its sample names in its metadata."""

import string
from collections.abc import Callable, Sequence

from data_pipeline.errors import InputError
from training.evaluate.multiple_choice import read_choice
from training.evaluate.options import NO_OPTIONS, Options

EXACT = "exact"
CHOICE = "choice"
ANLS_THRESHOLD = 0.5
RELAXED_TOLERANCE = 0.05


def score_text(
    metric: str, answer: str, references: Sequence[str], options: Options = NO_OPTIONS
) -> float:
    """The best score of an answer over the references.

    Args:
        metric: a key of `METRICS`.
        options: label -> text, of multiple choice.

    Raises:
        InputError: another metric.
    """
    if metric not in METRICS:
        raise InputError(f"metric is {metric!r}; use one of {', '.join(METRICS)}")
    if metric == CHOICE:
        return max(choice(answer, reference, options) for reference in references)
    return max(METRICS[metric](answer, reference) for reference in references)


def exact(answer: str, reference: str) -> float:
    """Equal but for white space around them."""
    return float(answer.strip() == reference.strip())


def anls(answer: str, reference: str) -> float:
    """Normalised Levenshtein similarity, 0 up to one half (Biten et al., ICCV 2019)."""
    a, b = (" ".join(text.lower().split()) for text in (answer, reference))
    if not a and not b:
        return 1.0
    similarity = 1 - levenshtein(a, b) / max(len(a), len(b))
    return similarity if similarity > ANLS_THRESHOLD else 0.0


def relaxed(answer: str, reference: str) -> float:
    """Numbers within 5 % of the reference; other answers equal but for case (ChartQA, 2022)."""
    found, wanted = _number(answer), _number(reference)
    if found is None or wanted is None:
        return float(answer.strip().lower() == reference.strip().lower())
    if wanted == 0:
        return float(found == 0)
    return float(abs(found - wanted) <= RELAXED_TOLERANCE * abs(wanted))


def choice(answer: str, reference: str, options: Options = NO_OPTIONS) -> float:
    """The same option; where the reference is none, the same text but for case and signs."""
    wanted = option_letter(reference, options)
    if wanted is not None:
        return float(option_letter(answer, options) == wanted)
    return float(_plain(answer) == _plain(reference))


METRICS: dict[str, Callable[[str, str], float]] = {
    EXACT: exact,
    "anls": anls,
    "relaxed": relaxed,
    CHOICE: choice,
}


def option_letter(text: str, options: Options = NO_OPTIONS) -> str | None:
    """The label of the one option that an answer states, else None."""
    return read_choice(text, options).label


def levenshtein(a: str, b: str) -> int:
    """Least number of characters to insert, delete or replace."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (left != right))
    return row[-1]


def _number(text: str) -> float | None:
    cleaned = text.strip().replace(",", "").lstrip("$€£").rstrip(".")
    percent = cleaned.endswith("%")
    try:
        return float(cleaned.rstrip("%")) / (100 if percent else 1)
    except ValueError:
        return None


def _plain(text: str) -> str:
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())
