"""Addressed randomness, and what it draws: how many tokens each image gets in an epoch.

Nothing here consumes a random stream: a value is a function of (seed, purpose, columns), so any
process can compute any part of an epoch alone, in any order, and gets what the others get.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from data_pipeline.index import Index
from data_pipeline.tiling import TilingSettings, num_tiles

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1


class TokenCountSettings(BaseModel):
    """How many tokens an image tile gets in training.

    The defaults are those of TokenFLEX (arXiv 2504.03154), section 3.
    """

    model_config = ConfigDict(extra="forbid")

    counts: list[int] = Field([64, 144, 256], min_length=1)
    """Tokens per tile; each a perfect square n^2, since tokens are an n x n grid."""
    probabilities: list[float] = [0.2, 0.3, 0.5]
    """Probability of each count. A count with probability 0 is evaluated but not trained."""
    draw: Literal["image", "sample", "pack"] = "image"
    """What shares one drawn count: the tiles of an image, the images of a sample, or a pack."""

    @model_validator(mode="after")
    def _check(self) -> "TokenCountSettings":
        problems = [_not_square(count) for count in self.counts if not _is_square(count)]
        if len(set(self.counts)) != len(self.counts):
            problems.append(f"counts {self.counts} names a count twice; name each once")
        if len(self.probabilities) != len(self.counts):
            problems.append(
                f"{len(self.counts)} counts but {len(self.probabilities)} probabilities; give one "
                "probability per count"
            )
        if not all(0 <= p <= 1 for p in self.probabilities):
            problems.append(f"probabilities {self.probabilities} must each lie in 0..1")
        elif abs(sum(self.probabilities) - 1) > 1e-6:
            problems.append(
                f"probabilities {self.probabilities} sum to {sum(self.probabilities):.6g}; "
                "they must sum to 1"
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
    cumulative = np.cumsum(settings.probabilities)
    # Divided by its last element: exactly 1, so that no value falls behind the last count.
    chosen = np.searchsorted(cumulative / cumulative[-1], uniform, side="right")
    return np.asarray(settings.sides, dtype=np.int64)[chosen]


@dataclass(frozen=True)
class DrawnSamples:
    """Samples and what was drawn for them (S samples, I images).

    ids: int64 [S]. lengths: int64 [S], tokens with image tokens. groups: int64 [S]; only samples of
    one group may share a pack. sides: int64 [I], n of each image. image_start: int64 [S+1]; the
    images of sample i are image_start[i] .. image_start[i+1].
    """

    ids: np.ndarray
    lengths: np.ndarray
    groups: np.ndarray
    sides: np.ndarray
    image_start: np.ndarray


class SampleDrawer:
    """Draws the token counts of an index's samples.

    Attributes:
        eligible: int64 [E], ids of the samples that fit into max_tokens at the smallest trained
            count.
        too_long: (id, tokens at that count) of the others.
    """

    def __init__(
        self,
        index: Index,
        tiling: TilingSettings,
        counts: TokenCountSettings,
        max_tokens: int,
        seed: int,
    ) -> None:
        self._counts, self._max_tokens, self._seed = counts, max_tokens, seed
        self._text_tokens = index.text_tokens.astype(np.int64)
        self._image_start = index.image_start
        self._tiles = tiles_per_image(index, tiling)
        shortest = self.at_side(counts.trained_sides[0]).lengths
        self.eligible = np.flatnonzero(shortest <= max_tokens)
        over = np.flatnonzero(shortest > max_tokens)
        self.too_long = list(zip(over.tolist(), shortest[over].tolist(), strict=True))

    def at_side(self, side: int) -> DrawnSamples:
        """All samples of the index with every image at one side; nothing is capped."""
        tiles_before = np.concatenate([[0], np.cumsum(self._tiles)])
        tiles = np.diff(tiles_before[self._image_start])
        return DrawnSamples(
            ids=np.arange(len(tiles)),
            lengths=self._text_tokens + tiles * side**2,
            groups=np.zeros(len(tiles), dtype=np.int64),
            sides=np.full(len(self._tiles), side, dtype=np.int64),
            image_start=self._image_start,
        )

    def draw(self, epoch: int, ids: np.ndarray) -> DrawnSamples:
        """What an epoch draws for eligible samples.

        A sample that does not fit into max_tokens has its images capped at the largest trained
        side at which it does.
        """
        first, last = self._image_start[ids], self._image_start[ids + 1]
        image_start = np.concatenate([[0], np.cumsum(last - first)])
        owner = np.repeat(np.arange(len(ids)), last - first)  # [I], position in ids
        number = np.arange(len(owner)) - image_start[owner]  # [I], image within its sample
        tiles = self._tiles[first[owner] + number]

        def lengths(sides: np.ndarray) -> np.ndarray:
            tokens = np.bincount(owner, weights=tiles * sides**2, minlength=len(ids))
            return self._text_tokens[ids] + tokens.astype(np.int64)

        by_image = self._counts.draw == "image"
        address = (ids[owner], number) if by_image else (ids,)
        drawn = draw_sides(self._counts, uniform_hash(self._seed, "tokens", epoch, *address))
        sides = uncapped = drawn if by_image else drawn[owner]
        cap = np.full(len(ids), max(self._counts.sides))
        total = lengths(sides)
        for side in self._counts.trained_sides[-2::-1]:  # below the largest, descending
            over = total > self._max_tokens
            if not over.any():
                break
            cap[over] = side
            sides = np.minimum(uncapped, cap[owner])
            total = lengths(sides)
        by_pack = self._counts.draw == "pack"
        groups = np.minimum(drawn, cap) if by_pack else np.zeros(len(ids), dtype=np.int64)
        return DrawnSamples(ids, total, groups, sides, image_start)


def tiles_per_image(index: Index, tiling: TilingSettings) -> np.ndarray:
    """Number of tiles of every image of the index, int64 [I]; each size is worked out once."""
    sizes = index.image_width.astype(np.int64) << 32 | index.image_height
    unique, inverse = np.unique(sizes, return_inverse=True)
    tiles = [num_tiles(size >> 32, size & 0xFFFFFFFF, tiling) for size in unique.tolist()]
    return np.array(tiles, dtype=np.int64)[inverse]


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
