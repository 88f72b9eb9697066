"""Swaps of samples of like length: packs keep what they may hold, and none stays much slower."""

import numpy as np
import pytest

from data_pipeline.balance import DEFAULT_COST
from data_pipeline.balance.deal import Packs, deal
from data_pipeline.balance.fit import best_fit_decreasing, gather
from data_pipeline.balance.swap import swap_alike
from data_pipeline.bench.mixes import draw_mix
from data_pipeline.draw import uniform_hash


def full_packs(max_tokens: int, samples: int = 3000) -> Packs:
    """Packs of two or three samples of many images, as full as best fit makes them."""
    lengths = draw_mix("many_images", 5, samples, max_tokens)
    cost = DEFAULT_COST.flops(*lengths) / 2.0**30
    values = np.stack([lengths.tokens, cost.astype(np.int64), lengths.tiles])
    pack = best_fit_decreasing(values, (max_tokens, None, None))
    pack[::50] = -1  # left over
    return gather(values, pack, int(pack.max()) + 1)


def slowest_of_step(packs: Packs, per_step: int) -> float:
    """FLOPs that random steps wait for, of the mean."""
    flops = packs.loads[1][: len(packs.items) // per_step * per_step]
    chance = uniform_hash(0, "steps", np.arange(len(flops))).argsort()
    return float(flops[chance].reshape(-1, per_step).max(axis=1).mean() / flops.mean())


@pytest.mark.parametrize("max_tiles", [None, 140])
def test_full_packs_are_leveled_without_breaking_a_cap(max_tiles: int | None) -> None:
    packs = full_packs(16384)
    caps = (16384, None, max_tiles)
    count, before = packs.count.copy(), slowest_of_step(packs, 64)
    kept = packs.pack_of() >= 0
    tiles = packs.loads[2].copy()
    swap_alike(packs, caps, 64)
    assert slowest_of_step(packs, 64) - 1 < 0.6 * (before - 1)
    assert packs.loads[0].max() <= 16384
    assert max_tiles is None or (packs.loads[2] <= np.maximum(tiles, max_tiles)).all()
    np.testing.assert_array_equal(packs.count, count)
    np.testing.assert_array_equal(packs.pack_of() >= 0, kept)
    np.testing.assert_array_equal(packs.loads, packs.values[:, packs.items].sum(axis=2))


def test_packs_that_no_step_waits_for_stay() -> None:
    alone, level = full_packs(16384), full_packs(16384)
    level.loads[1] = 1000 + np.arange(len(level.items)) % 5
    for packs, per_step in ((alone, 1), (level, 64)):
        before = packs.items.copy()
        swap_alike(packs, (16384, None, None), per_step)
        np.testing.assert_array_equal(packs.items, before)


@pytest.mark.parametrize(("max_tokens", "flops"), [(11, [9, 9]), (10, [6, 12])])
def test_a_swap_needs_room_in_both_packs(max_tokens: int, flops: list[int]) -> None:
    """9 for 6 would level FLOPs of 9 + 3 and 6 + 0, and make a pack of 11 tokens."""
    values = np.array([[5, 5, 6, 4], [9, 3, 6, 0]])
    packs = gather(values, np.array([0, 0, 1, 1]), 2)
    swap_alike(packs, (max_tokens, None), 2)
    assert sorted(packs.loads[1].tolist()) == flops


@pytest.mark.parametrize("samples", [0, 1, 2])
def test_few_samples(samples: int) -> None:
    packs = deal(np.full((2, samples), 3), 4)
    swap_alike(packs, (10, None), 4)
    assert packs.loads[1].sum() == 3 * samples
