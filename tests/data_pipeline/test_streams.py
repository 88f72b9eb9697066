"""A dataset's endless order: every epoch holds every sample, from any position on."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.mixture import Dataset
from data_pipeline.plan.streams import Stream
from tests.data_pipeline.indexes import make_index


def make_stream(
    shard_sizes: list[int], window_samples: int = 64, seed: int = 0, name: str = "a"
) -> Stream:
    number = sum(shard_sizes)
    index = make_index([1] * number, [[]] * number, shard_sizes)
    return Stream(Dataset(name, index), seed, window_samples)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    shard_sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    window_samples=st.integers(1, 200),
    cuts=st.lists(st.integers(0, 120), min_size=1, max_size=4),
)
def test_parts_join_to_whole_epochs(
    shard_sizes: list[int], window_samples: int, cuts: list[int]
) -> None:
    size = sum(shard_sizes)
    stream = make_stream(shard_sizes, window_samples)
    samples, epochs = stream.take(0, 3 * size)
    for epoch in range(3):
        own = samples[epochs == epoch]
        assert sorted(own.tolist()) == list(range(size))
    assert epochs.tolist() == sorted(epochs.tolist())
    places = [0, *np.cumsum([cut % (3 * size) for cut in cuts]).tolist()]
    for start, stop in pairwise(places):
        if stop <= 3 * size:
            part = make_stream(shard_sizes, window_samples).take(start, stop - start)
            assert part[0].tolist() == samples[start:stop].tolist()
            assert part[1].tolist() == epochs[start:stop].tolist()


def test_order_differs_by_epoch_seed_and_dataset() -> None:
    orders = [
        make_stream([100]).take(0, 100)[0],
        make_stream([100]).take(100, 100)[0],
        make_stream([100], seed=1).take(0, 100)[0],
        make_stream([100], name="b").take(0, 100)[0],
    ]
    for i in range(4):
        for j in range(i):
            assert abs(np.corrcoef(orders[i], orders[j])[0, 1]) < 0.4
            assert orders[i].tolist() != orders[j].tolist()


def test_a_window_reads_few_shards_and_mixes_them() -> None:
    stream = make_stream([1000] * 100, window_samples=3200)  # blocks of 200 samples
    samples, _ = stream.take(0, 3200)
    shards = samples // 1000
    assert 10 <= len(np.unique(shards)) <= 17  # 16 blocks, or 17 where the window cuts one
    # Elsewhere in the order other shards come.
    later, _ = stream.take(50_000, 3200)
    assert set(np.unique(later // 1000)) != set(np.unique(shards))


@pytest.mark.parametrize("shard_sizes", [[1], [1, 1, 1], [7, 1, 50]])
def test_no_samples_are_an_empty_part(shard_sizes: list[int]) -> None:
    samples, epochs = make_stream(shard_sizes).take(3, 0)
    assert (len(samples), len(epochs)) == (0, 0)
