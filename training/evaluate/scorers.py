"""Scores in 0..1 of an answer, by the metric that its sample names in its metadata."""

import re
import string
from collections.abc import Callable, Sequence

from data_pipeline.errors import InputError

EXACT = "exact"
ANLS_THRESHOLD = 0.5
RELAXED_TOLERANCE = 0.05

# A letter that stands alone: "B", "(B)", "B.", "Answer: B"; not the article in "A cat".
_LETTER = re.compile(r"(?<![A-Za-z])\(?([A-Z])(?:\)|[.:,]|\s*$)")


def score_text(metric: str, answer: str, references: Sequence[str]) -> float:
    """The best score of an answer over the references.

    Args:
        metric: a key of `METRICS`.

    Raises:
        InputError: another metric.
    """
    if metric not in METRICS:
        raise InputError(f"metric is {metric!r}; use one of {', '.join(METRICS)}")
    return max(METRICS[metric](answer, reference) for reference in references)


def exact(answer: str, reference: str) -> float:
    """Equal but for white space around them."""
    return float(answer.strip() == reference.strip())


def anls(answer: str, reference: str) -> float:
    """Normalised Levenshtein similarity, 0 below one half (Biten et al., ICCV 2019)."""
    a, b = (" ".join(text.lower().split()) for text in (answer, reference))
    if not a and not b:
        return 1.0
    similarity = 1 - levenshtein(a, b) / max(len(a), len(b))
    return similarity if similarity >= ANLS_THRESHOLD else 0.0


def relaxed(answer: str, reference: str) -> float:
    """Numbers within 5 % of the reference; other answers equal but for case (ChartQA, 2022)."""
    found, wanted = _number(answer), _number(reference)
    if found is None or wanted is None:
        return float(answer.strip().lower() == reference.strip().lower())
    if wanted == 0:
        return float(found == 0)
    return float(abs(found - wanted) <= RELAXED_TOLERANCE * abs(wanted))


def choice(answer: str, reference: str) -> float:
    """The same option: its letter where both have one, else the text but for case."""
    found, wanted = option_letter(answer), option_letter(reference)
    if wanted is not None:
        return float(found == wanted)
    return float(_plain(answer) == _plain(reference))


METRICS: dict[str, Callable[[str, str], float]] = {
    EXACT: exact,
    "anls": anls,
    "relaxed": relaxed,
    "choice": choice,
}


def option_letter(text: str) -> str | None:
    """The option that an answer names: "B", "b", "(B) a dog", "The answer is B."; else None."""
    stripped = text.strip()
    if re.fullmatch(r"\(?[a-zA-Z][).:]?", stripped):
        return stripped.strip("().:").upper()
    match = _LETTER.search(stripped)
    return match[1] if match else None


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
