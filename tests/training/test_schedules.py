"""Schedules in a step under ZeRO-3: the gradients they are to have, on any number of ranks."""

from pathlib import Path

import numpy as np
import pytest

from tests.ranks import RankPool
from tests.training import schedule_scenarios as scenarios

pytestmark = pytest.mark.multiprocess

SIDES = [2, 4, 8]
FP32 = ["train.precision=fp32"]


def close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = np.linalg.norm(found[name] - gradient)
        # The bias of the keys has no gradient but rounding: softmax ignores it.
        assert error <= 1e-4 * np.linalg.norm(gradient) + 1e-6, name
    assert sum(np.linalg.norm(g) > 1e-4 for g in expected.values()) > 20


def test_the_gradient_of_nested_copies_is_the_mean_over_counts(
    one_rank: RankPool, two_ranks: RankPool, digits_corpus: Path
) -> None:
    samples = range(5)
    fixed = [
        one_rank.run(
            scenarios.copies_gradients, digits_corpus, [[(i, [side]) for i in samples]], FP32
        )[0]
        for side in SIDES
    ]
    mean = {name: np.mean([g[name] for _, g in fixed], axis=0) for name in fixed[0][1]}
    packs = [[(i, SIDES) for i in samples[:3]], [(i, SIDES) for i in samples[3:]]]
    for metrics, gradients in two_ranks.run(scenarios.copies_gradients, digits_corpus, packs, FP32):
        close(gradients, mean)
        assert metrics["loss"] == pytest.approx(np.mean([m["loss"] for m, _ in fixed]), rel=1e-5)
        for side, (alone, _) in zip(SIDES, fixed, strict=True):
            assert metrics[f"loss_{side**2}"] == pytest.approx(alone["loss"], rel=1e-5)
        assert (metrics["samples"], metrics["images"], metrics["tiles"]) == (5, 5, 15)
