"""How good a packing is: padding, balance over the packs of a step, composition of steps."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_pipeline.balance.deal import Ints

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Measures:
    """Numbers over the steps of a plan.

    Shares are of 1. "max/mean" is over the packs of a step: its mean over steps, and the worst
    step. `efficiency` is the sum over steps of the mean FLOPs of their packs by the sum of the
    maximum: what is left of the throughput if all ranks wait for the slowest and FLOPs were time.
    `efficiency_bound` is that of packs that are equal but for samples that alone have more than a
    mean pack: no packing of these steps' samples can reach more. `tiles_per_sample_cv` is the
    coefficient of variation over steps, `.._if_random` that of steps of as many random samples.
    """

    steps: int
    padding: float
    tokens_max_over_mean: float
    tokens_max_over_mean_worst: float
    tiles_max_over_mean: float
    tiles_max_over_mean_worst: float
    attention_max_over_mean: float
    efficiency: float
    efficiency_bound: float
    tiles_per_sample_cv: float
    tiles_per_sample_cv_if_random: float
    tiles_per_pack_cv: float


@dataclass(frozen=True)
class SampleCosts:
    """What is known of samples: int64 tokens and tiles, float64 cost in FLOPs, [S] each.

    pairs: int64 [S], of query and key in attention; None: the square of tokens.
    """

    tokens: Ints
    tiles: Ints
    cost: Floats
    pairs: Ints | None = None


def measure(
    samples: SampleCosts, pack: Ints, packs_per_step: int, num_steps: int, max_tokens: int
) -> Measures:
    """Measure the first `num_steps` steps of a plan.

    Args:
        samples: S samples.
        pack: int64 [S], the pack of each; pack k is in step k // packs_per_step; -1: in none.
        packs_per_step: packs without samples count, as packs of nothing but padding.
        num_steps: at least 1, with at least one sample each.
    """
    member = np.flatnonzero((pack >= 0) & (pack < num_steps * packs_per_step))
    pack = pack[member]
    tokens, tiles = samples.tokens[member], samples.tiles[member]
    cost = samples.cost[member]
    shape = (num_steps, packs_per_step)

    def per_pack(values: npt.NDArray[np.generic]) -> Floats:
        sums = np.bincount(pack, weights=values, minlength=shape[0] * shape[1])
        return np.asarray(sums, dtype=np.float64).reshape(shape)

    length = tokens.astype(np.float64)
    pairs = length * length if samples.pairs is None else samples.pairs[member]
    loads, flops, tile_loads = per_pack(tokens), per_pack(cost), per_pack(tiles)
    tokens_ratio, tiles_ratio = _max_over_mean(loads), _max_over_mean(tile_loads)
    largest = np.zeros(num_steps)
    np.maximum.at(largest, pack // packs_per_step, cost)
    mean = flops.mean(axis=1)
    in_step = np.bincount(pack // packs_per_step, minlength=num_steps)
    spread = float(tiles.std() / tiles.mean()) if tiles.any() else 0.0
    return Measures(
        steps=num_steps,
        padding=1 - float(loads.mean()) / max_tokens,
        tokens_max_over_mean=float(tokens_ratio.mean()),
        tokens_max_over_mean_worst=float(tokens_ratio.max()),
        tiles_max_over_mean=float(tiles_ratio.mean()),
        tiles_max_over_mean_worst=float(tiles_ratio.max()),
        attention_max_over_mean=float(_max_over_mean(per_pack(pairs)).mean()),
        efficiency=_ratio(mean, flops.max(axis=1)),
        efficiency_bound=_ratio(mean, np.maximum(mean, largest)),
        tiles_per_sample_cv=_variation(tile_loads.sum(axis=1) / np.maximum(in_step, 1)),
        tiles_per_sample_cv_if_random=spread * float(np.sqrt((1 / np.maximum(in_step, 1)).mean())),
        tiles_per_pack_cv=_variation(tile_loads.mean(axis=1)),
    )


def fewest_packs(tokens: Ints, max_tokens: int) -> int:
    """A number of packs that no packing can go below (bound L2 of Martello and Toth, 1990).

    For every length a: samples longer than max_tokens - a share with none that is a or longer.
    """
    length = np.sort(tokens)
    if not len(length):
        return 0
    before = np.concatenate([[0], np.cumsum(length)])  # tokens of the samples before
    half = int(np.searchsorted(length, max_tokens // 2, "right"))
    smallest = np.concatenate([[0], length[:half]])
    start = np.searchsorted(length, smallest, "left")
    alone = np.maximum(np.searchsorted(length, max_tokens - smallest, "right"), half)
    over_half = len(length) - half
    rest = before[half] - before[start]  # tokens from a to half a pack
    room = (alone - half) * max_tokens - (before[alone] - before[half])
    more = -(-np.maximum(rest - room, 0) // max_tokens)
    return int(over_half + more.max())


def _max_over_mean(loads: Floats) -> Floats:
    """Of each step; 1 where all packs have nothing."""
    mean = loads.mean(axis=1)
    return np.where(mean > 0, loads.max(axis=1) / np.where(mean > 0, mean, 1), 1.0)


def _ratio(part: Floats, whole: Floats) -> float:
    total = float(whole.sum())
    return float(part.sum()) / total if total else 1.0


def _variation(values: Floats) -> float:
    mean = float(values.mean())
    return float(values.std()) / mean if mean else 0.0
