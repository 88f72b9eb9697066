"""A mean token budget: the router, the choice of counts, the command that trains and reports."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import InputError
from tests.training.exported import make_folder
from training.evaluate.__main__ import main
from training.evaluate.router import Router, train_router
from training.evaluate.token_budget import (
    allocate,
    best_mix,
    budget_table,
    check_token_budget,
    compare,
    parse_token_budget,
)

COUNTS = np.array([4, 9, 16])
WIDTH = 3


def tokens_of(choice: np.ndarray, tiles: np.ndarray) -> int:
    return int((tiles * COUNTS[choice]).sum())


@pytest.mark.parametrize("seed", range(12))
def test_no_other_choice_of_as_many_tokens_is_worth_more(seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = 6
    values = rng.random((size, 3)) if seed % 2 else rng.integers(0, 2, (size, 3)).astype(float)
    tiles = rng.integers(0 if seed % 3 else 1, 4, size)
    tiles[0] = 2
    for budget in (4, 5.5, 8, 9, 12.3, 16, 40):
        choice = allocate(values, COUNTS, tiles, budget)
        spent = tokens_of(choice, tiles)
        assert spent <= budget * tiles.sum() + 1e-6
        own = values[np.arange(size), choice].sum()
        for other in itertools.product(range(3), repeat=size):
            if tokens_of(np.array(other), tiles) <= spent:
                assert values[np.arange(size), list(other)].sum() <= own + 1e-9


def test_an_even_better_count_is_not_paid_for_where_a_smaller_one_is_as_good() -> None:
    values = np.array([[1.0, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 0], [1, 0, 0]])
    choice = allocate(values, COUNTS, np.ones(5, int), 16)
    assert choice.tolist() == [0, 1, 2, 0, 0]


def separable(number: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features, the first of which says from which count on the answer is right."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(number, WIDTH)) * [3.0, 1, 0] + [5, 0, 2]
    need = np.digitize(features[:, 0], [3.5, 6.5])
    return features, (np.arange(3) >= need[:, None]).astype(float)


def test_the_fit_is_the_optimum_of_its_loss() -> None:
    features, scores = separable()
    router = train_router(features, scores, COUNTS, np.arange(400), "m")
    x = (features - features.mean(0)) / np.where(features.std(0) > 1e-12, features.std(0), 1)
    residual = router.predict(features) - scores  # of the logistic loss, before penalties
    by_count = x.T @ residual  # [F, K]; a difference is in the weights of all larger counts, too
    by_difference = by_count[:, ::-1].cumsum(axis=1)[:, ::-1]
    differences = np.diff(router.weight, axis=1, prepend=0)
    penalty = -float(by_difference[0, 0]) / differences[0, 0]
    assert round(penalty, 3) in (1, 10, 100, 1000)
    gradient = by_difference + round(penalty) * differences
    assert gradient == pytest.approx(np.zeros((WIDTH, 3)), abs=1e-3)
    assert residual.sum(0) + 2e-3 * router.bias == pytest.approx(np.zeros(3), abs=1e-4)
    assert not np.abs(router.weight[2]).max()  # a feature that is constant says nothing


def test_a_router_beats_the_mix_of_fixed_counts_and_the_oracle_the_router(tmp_path: Path) -> None:
    features, scores = separable()
    router = train_router(features, scores, COUNTS, np.arange(400), "m")
    router.save(tmp_path / "router.safetensors")
    router = Router.load(tmp_path / "router.safetensors", "m")
    features, scores = separable(seed=1)
    tiles = np.random.default_rng(2).integers(1, 3, 400)
    found = compare(scores, router.predict(features), [4, 9, 16], tiles, 9, 500, 0)
    fixed, mix, routed, oracle = found["policies"]
    assert fixed["name"] == "fixed 9" and fixed["mean_tokens"] == 9
    assert mix["mean_tokens"] == routed["mean_tokens"] <= 9
    assert fixed["accuracy"] + 0.1 < routed["accuracy"] <= oracle["accuracy"]
    gain = found["router_over_fixed"]
    assert 0.05 < gain["low"] < gain["difference"] < gain["high"]
    assert gain["difference"] == pytest.approx(routed["accuracy"] - mix["accuracy"])
    assert sum(routed["shares"].values()) == pytest.approx(1)
    text = budget_table(found)
    assert f"{100 * routed['accuracy']:.1f}" in text and f"{100 * gain['low']:+.1f}" in text


def test_the_mix_is_the_best_of_two_counts() -> None:
    scores = np.tile([[0.6, 0.2, 0.9]], (10, 1))  # a count that was not trained collapses
    name, mean, expected, shares = best_mix(scores, [4, 9, 16], 10)
    assert (name, mean) == ("fixed, 4 and 16 mixed", 10)
    assert shares == {4: 0.5, 9: 0, 16: 0.5} and expected == pytest.approx(np.full(10, 0.75))
    assert best_mix(scores, [4, 9, 16], 4.0)[2] == pytest.approx(np.full(10, 0.6))


@pytest.mark.parametrize(
    ("text", "mean"), [("16", 16), ("tokens=16.5", 16.5), ("latency=5ms", None), ("-4", None)]
)
def test_the_form_of_a_budget(text: str, mean: float | None) -> None:
    assert parse_token_budget(text) == mean


def test_a_budget_that_cannot_be_kept_is_an_error() -> None:
    with pytest.raises(InputError, match=r"\b3 tokens .*smallest count, 4.*--budget 4"):
        check_token_budget(3, [4, 9])
    with pytest.raises(InputError, match=r"only 4 .*--num-image-tokens"):
        check_token_budget(9, [4])
    with pytest.raises(InputError, match="no images"):
        compare(np.ones((5, 3)), np.ones((5, 3)), [4, 9, 16], np.zeros(5, int), 9, 10, 0)


def test_too_few_samples_train_no_router() -> None:
    features, scores = separable(39)
    with pytest.raises(InputError, match=r"39 samples .*40 .*--router-share"):
        train_router(features, scores, COUNTS, np.arange(39), "m")


def test_a_router_of_something_else_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "router.safetensors"
    with pytest.raises(InputError, match=r"no router at .*--train-router"):
        Router.load(path, "m")
    path.write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"not a router.*--train-router"):
        Router.load(path, "m")
    features, scores = separable(50)
    router = train_router(features, scores, COUNTS, np.arange(50), "m")
    router.save(path)
    with pytest.raises(InputError, match=r"another model.*--train-router"):
        Router.load(path, "other")
    with pytest.raises(InputError, match=r"3 features.* gives 2"):
        router.predict(features[:, :2])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_folder(tmp_path_factory.mktemp("exported"), samples=100, steps=25)


def command(folder: tuple[Path, Path], out: Path, *more: str) -> list[str]:
    quick = ["--latency-samples", "0", "--resamples", "50", "--num-image-tokens", "4", "9", "16"]
    return [*map(str, folder), "--out", str(out), *quick, *more]


def test_the_command_trains_reports_on_other_samples_and_takes_the_router_again(
    folder: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(command(folder, out, "--budget", "9")) == 2
    assert "--train-router" in capfd.readouterr().err and not (out / "rows").exists()
    train = ["--train-router", "--budget", "tokens=9", "--budget", "accuracy=1%"]
    assert main(command(folder, out, *train)) == 0
    record = json.loads((out / "results.json").read_text())
    routing = record["routing"]
    assert routing["router"] == str(folder[0] / "router.safetensors")
    usable = record["counts"][0]["samples"]
    assert routing["trained_on"] + routing["reported_on"] == usable
    (found,) = routing["budgets"]
    assert found["samples"] == routing["reported_on"] >= 20
    assert found["policies"][2]["mean_tokens"] <= 9 and len(record["budgets"]) == 1
    assert found["policies"][2]["accuracy"] <= found["policies"][3]["accuracy"] + 1e-9
    printed = capfd.readouterr().out
    assert "oracle" in printed and "router over the mix" in printed
    # The router in the folder changes no fingerprint, and its own samples are not reported.
    assert main(command(folder, out, "--budget", "9")) == 0
    again = json.loads((out / "results.json").read_text())["routing"]
    assert again == routing
    assert main(command(folder, out, "--budget", "3")) == 2
    assert "smallest count, 4" in capfd.readouterr().err
    fewer = [a for a in command(folder, out, "--budget", "9") if a != "9" or a == out]
    assert main([*fewer, "9"]) == 2  # counts 4 and 16 only
    assert "--num-image-tokens 4 9 16" in capfd.readouterr().err


def test_a_split_too_small_is_an_error_before_anything_is_scored(
    folder: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(folder[0], copy)
    few: list[tuple[list[str], str]] = [
        (["--limit", "30"], "--router-share"),
        (["--router-share", "0.95"], "left to report on"),
    ]
    for more, said in few:
        arguments: Any = command((copy, folder[1]), tmp_path / "out", "--train-router", *more)
        assert main([*arguments, "--budget", "9"]) == 2
        assert said in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
