"""Best fit: every sample in one pack, no pack too full, few packs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import InputError
from data_pipeline.packing import best_fit

CAPACITY = 64


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
    packs = best_fit(lengths, CAPACITY)
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
    assert len(best_fit(lengths, 8192)) <= 1.02 * fewest + 1


def test_takes_arrays_and_lists_alike_and_is_deterministic() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 500)
    expected = best_fit(lengths.tolist(), 100)
    assert best_fit(lengths, 100) == best_fit(lengths.astype(np.int32), 100) == expected


def test_edges() -> None:
    assert best_fit([], 10) == []
    assert best_fit([10, 10], 10) == [[0], [1]]
    assert best_fit([5, 10, 5], 10) == [[0, 2], [1]]
    assert best_fit([6, 3, 4], 10) == [[0, 1], [2]]  # in order: no better pack is foreseen
    assert best_fit([0, 0], 10) == [[0, 1]]


@pytest.mark.parametrize("lengths", [[3, 11], [3, -1]])
def test_a_length_out_of_range_is_named(lengths: list[int]) -> None:
    with pytest.raises(InputError, match=rf"item 1 .*{lengths[1]}.* 0\.\.10"):
        best_fit(lengths, 10)
