"""The moving average of the weights: its numbers, saved, resumed, on other ranks, exported."""

import math
from pathlib import Path

import pytest
import torch

from data_pipeline.errors import InputError
from tests.ranks import RankPool
from tests.training import optimizer_scenarios as scenarios
from tests.training.elastic_scenarios import FP32, STEPS
from training.zero3.saved_tensors import saved_tensors
from training.zero3.shards import Shards

pytestmark = pytest.mark.multiprocess
EMA = [*FP32, "train.ema={decay: 0.75}"]
STEP = f"step-{STEPS - 1:08d}"


def test_it_is_the_average_resumes_bitwise_and_goes_to_other_ranks(
    one_rank: RankPool, two_ranks: RankPool, digits_corpus: Path, tmp_path: Path
) -> None:
    found = two_ranks.run(scenarios.averaged, digits_corpus, tmp_path, EMA)
    path = tmp_path / STEP
    for rank in found:
        first, second, third = ([m.double() for m in step] for step in rank["masters"])
        for number, (one, two, three) in enumerate(zip(first, second, third, strict=True)):
            expected = 0.75 * (0.75 * one + 0.25 * two) + 0.25 * three
            assert not torch.equal(one, two)
            torch.testing.assert_close(rank["end"][number].double(), expected, rtol=0, atol=1e-6)
    again = two_ranks.run(scenarios.average_resumed, digits_corpus, path, EMA)
    for rank, before in zip(again, found, strict=True):
        assert rank["steps"] == STEPS - 1
        for key, wanted in (("loaded", "saved"), ("end", "end")):
            assert all(map(torch.equal, rank[key], before[wanted]))
    stored = {t.name: torch.cat([*t.pieces()]) for t in saved_tensors(path, 2, ema=True)}
    masters = {t.name: torch.cat([*t.pieces()]) for t in saved_tensors(path, 2)}
    shapes = Shards(path, 2).shapes()
    assert all(not torch.equal(stored[name], masters[name]) for name in shapes)
    assert all(torch.equal(stored[name], masters[name]) for name in stored.keys() - shapes.keys())
    (alone,) = one_rank.run(scenarios.average_resumed, digits_corpus, path, EMA)
    assert alone["steps"] == STEPS - 1
    assert sum(map(len, alone["loaded"])) == sum(map(math.prod, shapes.values()))
    whole = torch.cat([stored[name] for name in shapes])  # one rank: no padding, in this order
    assert torch.equal(torch.cat(alone["loaded"]), whole)
    every = two_ranks.run(
        scenarios.average_resumed, digits_corpus, path, [*FP32, "train.ema={decay: 0.75, every: 2}"]
    )
    assert all(map(torch.equal, every[0]["end"], every[0]["loaded"]))  # the third step is no update


def test_a_checkpoint_without_one_says_so(
    one_rank: RankPool, digits_corpus: Path, tmp_path: Path
) -> None:
    one_rank.run(scenarios.averaged, digits_corpus, tmp_path, [*FP32, "train.ema={every: 9}"])
    with pytest.raises(InputError, match=r"no moving average.*train\.ema"):
        [*saved_tensors(tmp_path / STEP, 1, ema=True)]
