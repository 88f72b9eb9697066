"""`train.precision: auto` is settled once, for all ranks alike; bf16 adds gradients up in fp32."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.ranks import RankPool
from tests.training import scenarios
from training import precision
from training.distributed import Ranks
from training.precision import has_fast_bf16, settle_precision

pytestmark = pytest.mark.multiprocess


def settled(ranks: Ranks, corpus: Path, wanted: str, fast_ranks: list[int]) -> str:
    real = precision.has_fast_bf16
    precision.has_fast_bf16 = lambda device: ranks.rank in fast_ranks
    try:
        config = scenarios.tiny_config(corpus, f"train.precision={wanted}")
        return settle_precision(config, ranks).train.precision
    finally:
        precision.has_fast_bf16 = real


@pytest.mark.parametrize(
    ("wanted", "fast_ranks", "expected"),
    [
        ("auto", [0, 1], "bf16"),
        ("auto", [0], "fp32"),  # one slow rank would keep the others waiting
        ("auto", [], "fp32"),
        ("bf16", [], "bf16"),
        ("fp32", [0, 1], "fp32"),
    ],
)
def test_all_ranks_settle_on_one_precision(
    two_ranks: RankPool, digits_corpus: Path, wanted: str, fast_ranks: list[int], expected: str
) -> None:
    assert two_ranks.run(settled, digits_corpus, wanted, fast_ranks) == [expected] * 2


def test_gpus_have_it_from_ampere_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, fast in (((7, 5), False), ((8, 0), True), ((10, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert has_fast_bf16(torch.device("cuda")) == fast


def test_bf16_accumulates_and_shares_out_without_drowning_gradients(
    one_rank: RankPool, two_ranks: RankPool, digits_corpus: Path
) -> None:
    """Two ranks with two packs each against one rank with four: only rounding differs."""
    packs, half = [[0, 1], [2], [3], [4]], ["train.precision=bf16"]
    loss, expected = one_rank.run(scenarios.step_gradients, digits_corpus, packs, half)[0]
    found_loss, found = two_ranks.run(scenarios.step_gradients, digits_corpus, packs, half)[0]
    assert found_loss == pytest.approx(loss, rel=1e-3)
    for name, gradient in expected.items():
        error = np.linalg.norm(found[name] - gradient)
        # The bias of the keys has no gradient but rounding: softmax ignores it.
        assert error <= 1e-2 * np.linalg.norm(gradient) + 1e-3, name
