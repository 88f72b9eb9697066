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


CONSISTENT = [*FP32, "data.tokens.schedule=consistency"]


def test_consistency_does_not_depend_on_ranks_and_slices_and_its_weight_is_linear(
    one_rank: RankPool, two_ranks: RankPool, digits_corpus: Path
) -> None:
    samples = [(i, SIDES) for i in range(4)]

    def run(pool: RankPool, packs: list, *more: str) -> list:
        return pool.run(scenarios.copies_gradients, digits_corpus, packs, [*CONSISTENT, *more])

    ((metrics, gradients),) = run(one_rank, [samples])
    ((_, plain),) = run(one_rank, [samples], "train.consistency.weight=0")
    doubled = {name: 2 * gradients[name] - plain[name] for name in plain}
    sliced = ["train.loss_chunk_tokens=100", "train.consistency.weight=2"]
    for found, twice in run(two_ranks, [samples[:1], samples[1:]], *sliced):
        close(twice, doubled)
        for key in ("consistency_4", "consistency_16", "loss_4", "loss_64", "loss"):
            assert found[key] == pytest.approx(metrics[key], rel=1e-4)
        assert found["consistency_4"] > 0 and "consistency_64" not in found
    moved = [n for n, g in plain.items() if np.linalg.norm(gradients[n] - g) > 1e-5]
    assert len(moved) > 20
    for _, shared in run(two_ranks, [samples, []]):  # rank 1 has nothing, and keeps up
        close(shared, gradients)


def test_a_consistent_run_resumes_bitwise(
    two_ranks: RankPool, digits_corpus: Path, tmp_path: Path
) -> None:
    timed = ("_s", "wait", "gib", "rank")
    for whole, resumed in two_ranks.run(
        scenarios.resumed_step, digits_corpus, tmp_path, CONSISTENT
    ):
        for before, after in zip(whole, resumed, strict=True):
            same = {key for key in before if not any(word in key for word in timed)}
            assert {"loss", "grad_norm", "data_hash", "consistency_16"} <= same
            assert {key: before[key] for key in same} == {key: after[key] for key in same}
