"""Which token count to serve: the smallest that meets what the user can afford."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipeline.errors import InputError

_FORM = re.compile(r"(latency)=(\d+(?:\.\d+)?)(ms|s)|(accuracy)=(\d+(?:\.\d+)?)%")


@dataclass(frozen=True)
class ServingBudget:
    """latency: milliseconds that an answer may take. accuracy: share of the best, in 0..1."""

    kind: str
    limit: float
    text: str


@dataclass(frozen=True)
class Decision:
    """count: None where no count meets the budget. reason: how it was decided."""

    budget: str
    count: int | None
    reason: str


def parse_budget(text: str) -> ServingBudget:
    """Read `latency=50ms`, `latency=0.2s` or `accuracy=99%`; InputError for another form."""
    match = _FORM.fullmatch(text.replace(" ", ""))
    if not match:
        raise InputError(
            f"--budget is {text!r}; give latency=50ms, latency=0.2s, accuracy=99%, or a mean of "
            "tokens per tile, tokens=64"
        )
    if match[1]:
        return ServingBudget("latency", float(match[2]) * (1 if match[3] == "ms" else 1000), text)
    if not 0 < float(match[5]) <= 100:
        raise InputError(f"--budget is {text!r}; the accuracy is a share of the best, up to 100%")
    return ServingBudget("accuracy", float(match[5]) / 100, text)


def decide(
    budget: ServingBudget, entries: Sequence[Mapping[str, Any]], resampled: np.ndarray
) -> Decision:
    """Apply the rule to the entries of `summarise`, ascending in their counts.

    latency: among the counts whose median answer is in time, the most accurate one, the smaller of
    equals. accuracy: the smallest count with that share of the best count's accuracy.

    Args:
        resampled: float64 [counts, resamples], for how sure that is.

    Raises:
        InputError: a budget of latency where none was measured.
    """
    accuracy = np.array([entry["accuracy"] for entry in entries])
    counts = [entry["num_image_tokens"] for entry in entries]
    if budget.kind == "accuracy":
        return _by_accuracy(budget, counts, accuracy, resampled)
    if any(not entry.get("latency") for entry in entries):
        raise InputError(f"--budget {budget.text} needs latencies; give --latency-samples above 0")
    times = [entry["latency"]["answer_ms"] for entry in entries]
    within = [i for i, time in enumerate(times) if time <= budget.limit]
    if not within:
        best = int(np.argmin(times))
        reason = f"no count is in time; the fastest, {counts[best]}, takes {times[best]:.1f} ms"
        return Decision(budget.text, None, reason)
    chosen = max(within, key=lambda i: (accuracy[i], -counts[i]))
    return Decision(
        budget.text,
        counts[chosen],
        f"{counts[chosen]} tokens: {100 * accuracy[chosen]:.1f} % right in {times[chosen]:.1f} ms "
        f"(median); the most accurate of the {len(within)} of {len(counts)} counts within "
        f"{budget.limit:g} ms",
    )


def _by_accuracy(
    budget: ServingBudget, counts: Sequence[int], accuracy: np.ndarray, resampled: np.ndarray
) -> Decision:
    best = int(np.argmax(accuracy))  # the smaller of equals
    if accuracy[best] == 0:
        return Decision(budget.text, None, "no count answers anything right")
    # A share such as 99 % of 1/3 must not fail by a rounding of the last bit.
    enough = accuracy >= budget.limit * accuracy[best] * (1 - 1e-12)
    chosen = int(np.argmax(enough))
    sure = (resampled[chosen] >= budget.limit * resampled.max(axis=0) * (1 - 1e-12)).mean()
    return Decision(
        budget.text,
        counts[chosen],
        f"{counts[chosen]} tokens: {100 * accuracy[chosen]:.1f} % right, "
        f"{100 * accuracy[chosen] / accuracy[best]:.1f} % of the best "
        f"({100 * accuracy[best]:.1f} % at {counts[best]}); no smaller count reaches "
        f"{100 * budget.limit:g} %. In {100 * sure:.0f} % of the bootstrap's resamples it does so "
        "too",
    )
