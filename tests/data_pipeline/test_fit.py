"""Best fit: every sample in one pack, no pack too full, few packs."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.balance.fit import best_fit, best_fit_decreasing
from data_pipeline.errors import InputError
from data_pipeline.stats.measures import fewest_packs

CAPACITY = 64


def packed(lengths: npt.ArrayLike, max_tokens: int) -> list[list[int]]:
    """The samples of each pack."""
    numbers = best_fit(lengths, max_tokens)
    return [np.flatnonzero(numbers == k).tolist() for k in range(numbers.max(initial=-1) + 1)]


def naive_best_fit(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """The textbook definition: the fullest pack with room, the first of equally full ones."""
    packs: list[list[int]] = []
    for item in range(len(lengths)):
        rooms = [max_tokens - sum(lengths[i] for i in pack) for pack in packs]
        fitting = [p for p, room in enumerate(rooms) if room >= lengths[item]]
        if fitting:
            packs[min(fitting, key=lambda p: (rooms[p], p))].append(item)
        else:
            packs.append([item])
    return packs


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, CAPACITY), max_size=60))
def test_is_best_fit_in_order(lengths: list[int]) -> None:
    packs = packed(lengths, CAPACITY)
    assert packs == naive_best_fit(lengths, CAPACITY)
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    fills = sorted(sum(lengths[i] for i in pack) for pack in packs)
    assert all(fill <= CAPACITY for fill in fills)
    if len(fills) > 1:
        assert fills[0] + fills[1] > CAPACITY  # otherwise the two could have been one pack


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.floats(4.0, 6.5), st.floats(0.3, 1.2))
def test_few_packs_on_texts_of_usual_lengths(seed: int, mean: float, spread: float) -> None:
    lengths = np.random.default_rng(seed).lognormal(mean, spread, 2000).astype(int).clip(8, 8192)
    fewest = -(-int(lengths.sum()) // 8192)
    assert len(packed(lengths, 8192)) <= 1.02 * fewest + 1


def test_takes_arrays_and_lists_alike_and_is_deterministic() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 500)
    expected = packed(lengths.tolist(), 100)
    assert packed(lengths, 100) == packed(lengths.astype(np.int32), 100) == expected


def test_edges() -> None:
    assert packed([], 10) == []
    assert packed([10, 10], 10) == [[0], [1]]
    assert packed([5, 10, 5], 10) == [[0, 2], [1]]
    assert packed([6, 3, 4], 10) == [[0, 1], [2]]  # in order: no better pack is foreseen
    assert packed([0, 0], 10) == [[0, 1]]


@pytest.mark.parametrize("lengths", [[3, 11], [3, -1]])
def test_a_length_out_of_range_is_named(lengths: list[int]) -> None:
    with pytest.raises(InputError, match=rf"item 1 .*{lengths[1]}.* 0\.\.10"):
        best_fit(lengths, 10)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 30), max_size=60), st.integers(0, 60))
def test_best_fit_decreasing_and_its_bound(lengths: list[int], first: int) -> None:
    tokens = np.array(lengths, dtype=np.int64)
    packs = best_fit_decreasing(np.stack([tokens, tokens]), (30, None))
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    plain = naive_best_fit([lengths[i] for i in order], 30)
    assert [int(packs[order[items[0]]]) for items in plain] == list(range(len(plain)))
    assert all(len({int(packs[order[i]]) for i in items}) == 1 for items in plain)
    assert fewest_packs(tokens, 30) <= len(plain)
    assert -(-int(tokens.sum()) // 30) <= fewest_packs(tokens, 30) or not len(tokens)
    assert sum(2 * n > 30 for n in lengths) <= fewest_packs(tokens, 30)
    early = best_fit_decreasing(np.stack([tokens, tokens]), (30, None), first)
    alone = best_fit_decreasing(np.stack([tokens, tokens])[:, :first], (30, None))
    np.testing.assert_array_equal(early[:first], alone)  # as if there were no others
