"""Means over seeds with their uncertainty, and what each arm scored at each count."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
from scipy.stats import t

from training.evaluate.in_training import ALL

CONFIDENCE = 0.95


@dataclass(frozen=True)
class SeedInterval:
    """A mean with Student's 95 % interval of it; low and high are None of a single value."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "SeedInterval":
        """Of at least one value, each from another seed."""
        n, mean = len(values), float(np.mean(values))
        if n < 2:
            return cls(mean, None, None, n)
        half = float(t.ppf((1 + CONFIDENCE) / 2, n - 1) * np.std(values, ddof=1) / sqrt(n))
        return cls(mean, mean - half, mean + half, n)

    def points(self, sign: bool = False) -> str:
        """In percent: 91.2 (90.1 to 92.3), with `sign` as a difference."""
        plus = "+" if sign else ""
        text = f"{100 * self.mean:{plus}.1f}"
        if self.low is None or self.high is None:
            return f"{text} (once)"
        return f"{text} ({100 * self.low:{plus}.1f} to {100 * self.high:{plus}.1f})"

    def to_json(self) -> dict[str, Any]:
        return {"mean": self.mean, "low": self.low, "high": self.high, "seeds": self.n}


class Scores:
    """Accuracies in 0..1 by arm, seed, level of detail and token count.

    Args:
        evaluations: (arm, seed) -> the rows of `Evaluation.to_json`.
        drawn: arm -> the counts that its training drew.
    """

    def __init__(
        self,
        evaluations: Mapping[tuple[str, int], Iterable[Mapping[str, Any]]],
        drawn: Mapping[str, Sequence[int]],
    ) -> None:
        self._accuracy = {
            (arm, seed, row["detail"], row["num_image_tokens"]): float(row["accuracy"])
            for (arm, seed), rows in evaluations.items()
            for row in rows
        }
        self.arms = [arm for arm in drawn if any(arm == found for found, _ in evaluations)]
        self.drawn = {arm: sorted(drawn[arm]) for arm in self.arms}
        self.counts = sorted({key[3] for key in self._accuracy})
        self.details = sorted({key[2] for key in self._accuracy}, key=lambda d: (d == ALL, d))
        self._seeds = {
            arm: sorted(seed for found, seed in evaluations if found == arm) for arm in self.arms
        }

    def seeds(self, *arms: str) -> list[int]:
        """Those that all of the arms have."""
        return sorted(set.intersection(*(set(self._seeds[arm]) for arm in arms)))

    def at(self, arm: str, count: int, seeds: Sequence[int], detail: str = ALL) -> np.ndarray:
        """float64 [seeds] of an arm at a count."""
        return np.array([self._accuracy[arm, seed, detail, count] for seed in seeds])

    def mean(self, arm: str, count: int, detail: str = ALL) -> SeedInterval:
        """Over all seeds of the arm."""
        return SeedInterval.of(self.at(arm, count, self.seeds(arm), detail).tolist())

    def difference(self, arm: str, other: str, count: int, detail: str = ALL) -> SeedInterval:
        """An arm minus another, seed by seed: the same weights at the start and the same data."""
        seeds = self.seeds(arm, other)
        own = self.at(arm, count, seeds, detail)
        return SeedInterval.of((own - self.at(other, count, seeds, detail)).tolist())

    def fixed(self) -> dict[int, str]:
        """Count -> the arm that was trained at it alone, ascending; the first of several."""
        found: dict[int, str] = {}
        for arm in self.arms:
            if len(self.drawn[arm]) == 1:
                found.setdefault(self.drawn[arm][0], arm)
        return dict(sorted(found.items()))

    def flexible(self) -> list[str]:
        """The arms trained at several counts."""
        return [arm for arm in self.arms if len(self.drawn[arm]) > 1]
