"""Addressed randomness, and what it draws: how many tokens each image gets in an epoch.

Nothing here consumes a random stream: a value is a function of (seed, purpose, columns), so any
process can compute any part of an epoch alone, in any order, and gets what the others get.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from data_pipeline.config_file import Settings

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1


class TokenCountSettings(Settings):
    """How many tokens an image tile gets in training.

    The defaults are those of TokenFLEX (arXiv 2504.03154), section 3.
    """

    counts: list[int] = Field([64, 144, 256], min_length=1)
    """Tokens per tile; each a perfect square n^2, since tokens are an n x n grid."""
    probabilities: list[float] = Field([0.2, 0.3, 0.5])
    """Probability of each count. A count with probability 0 is evaluated but not trained."""
    draw: Literal["image", "sample", "pack"] = "image"
    """What shares one drawn count: the tiles of an image, the images of a sample, or a pack."""
    schedule: Literal["stochastic", "nested", "consistency"] = "stochastic"
    """stochastic: counts are drawn; nested: a copy of each sample at every trained count, and
    consistency: copies that also learn to answer like the largest (`train.consistency.weight`)."""

    @model_validator(mode="after")
    def _check(self) -> "TokenCountSettings":
        problems = [_not_square(count) for count in self.counts if not _is_square(count)]
        problems += choice_problems("count", self.counts, self.probabilities)
        if self.schedule != "stochastic" and self.draw == "pack":
            problems.append(
                f"draw=pack gives a pack one count, but schedule={self.schedule} puts a sample's "
                "copies at all counts into one pack; leave draw out"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def sides(self) -> list[int]:
        """Side n of the token grid of each count, in the order of `counts`."""
        return [math.isqrt(count) for count in self.counts]

    @property
    def trained_sides(self) -> list[int]:
        """The sides that training can draw (probability above 0), ascending."""
        drawn = zip(self.sides, self.probabilities, strict=True)
        return sorted(side for side, probability in drawn if probability > 0)

    @property
    def shares(self) -> list[float]:
        """Part of the images that each count is meant to get, in the order of `counts`."""
        if self.schedule == "stochastic":
            return self.probabilities
        return [(p > 0) / len(self.trained_sides) for p in self.probabilities]

    def describe(self) -> str:
        """The counts, and how samples get them."""
        if self.schedule == "stochastic":
            return f"{self.counts} at {self.probabilities}"
        counts = [n * n for n in self.trained_sides]
        return f"{counts}, each sample at all of them ({self.schedule})"

    def fingerprint(self) -> dict[str, Any]:
        """What the plan depends on; without the default schedule, which older checkpoints lack."""
        default = {"schedule"} if self.schedule == "stochastic" else None
        return self.model_dump(mode="json", exclude=default)


def uniform_hash(seed: int, purpose: str, *columns: int | np.ndarray) -> np.ndarray:
    """Uniform values in [0, 1) addressed by (seed, purpose, columns), the same in every process.

    Args:
        seed: any integer.
        purpose: keeps independent uses of the same columns apart, such as "order".
        columns: integers or integer arrays that broadcast together.

    Returns:
        float64 array of the columns' broadcast shape, with 53 random bits each.
    """
    digest = hashlib.sha256(f"{seed}:{purpose}".encode()).digest()
    state = np.array(int.from_bytes(digest[:8], "little"), dtype=np.uint64)
    with np.errstate(over="ignore"):  # arithmetic is modulo 2^64
        for column in columns:
            # One more step of splitmix64 per column: the column says how far to jump.
            state = _mix(state + (_as_uint64(column) + np.uint64(1)) * _GOLDEN)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def draw_sides(settings: TokenCountSettings, uniform: np.ndarray) -> np.ndarray:
    """Turn uniform values in [0, 1) into grid sides n, int64 of the same shape."""
    return choose(settings.sides, settings.probabilities, uniform)


def choice_problems(
    kind: str, values: Sequence[int], probabilities: Sequence[float] | None
) -> list[str]:
    """What is wrong with values that are drawn, each a `kind`; None: all as likely."""
    problems = []
    if len(set(values)) != len(values):
        problems.append(f"{kind}s {values} names a {kind} twice; name each once")
    if probabilities is None:
        return problems
    if len(probabilities) != len(values):
        problems.append(
            f"{len(values)} {kind}s but {len(probabilities)} probabilities; give one "
            f"probability per {kind}"
        )
    if not all(0 <= p <= 1 for p in probabilities):
        problems.append(f"probabilities {probabilities} must each lie in 0..1")
    elif abs(sum(probabilities) - 1) > 1e-6:
        problems.append(
            f"probabilities {probabilities} sum to {sum(probabilities):.6g}; they must sum to 1"
        )
    return problems


def choose(
    values: Sequence[int], probabilities: Sequence[float], uniform: np.ndarray
) -> np.ndarray:
    """Turn uniform values in [0, 1) into drawn values, int64 of the same shape."""
    cumulative = np.cumsum(probabilities)
    # Divided by its last element: exactly 1, so that no value falls behind the last one.
    chosen = np.searchsorted(cumulative / cumulative[-1], uniform, side="right")
    return np.asarray(values, dtype=np.int64)[chosen]


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _as_uint64(column: int | np.ndarray) -> np.ndarray:
    if isinstance(column, np.ndarray):
        return column.astype(np.uint64)
    return np.array(column & _MASK, dtype=np.uint64)


def _is_square(count: int) -> bool:
    return count >= 1 and math.isqrt(count) ** 2 == count


def _not_square(count: int) -> str:
    root = math.isqrt(max(count, 1))
    nearest = f"{root**2} or {(root + 1) ** 2}" if count > 1 else "1"
    return f"count {count} is not a perfect square; the nearest is {nearest}"
