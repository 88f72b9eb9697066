"""The command that plans a file of lengths: every sample once, errors that name what is wrong."""

import argparse
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.bench.mixes import MIXES
from data_pipeline.errors import InputError
from data_pipeline.stats import simulation as simulate


def run(tmp_path: Path, *options: str, **arrays: np.ndarray) -> dict[str, np.ndarray]:
    """Write lengths, run the command, return the plan."""
    lengths, out = tmp_path / "lengths.npz", tmp_path / "plan.npz"
    np.savez(lengths, **arrays)
    parser = argparse.ArgumentParser()
    simulate.add_arguments(parser)
    given = ["--lengths", str(lengths), "--out", str(out), *options]
    simulate.run(parser.parse_args(given))
    with np.load(out) as plan:
        return dict(plan)


SMALL = ("--max-tokens", "4096", "--packs-per-step", "4", "--window-samples", "300")


def test_every_sample_that_fits_is_placed_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens, tiles = MIXES["standard"](np.random.default_rng(0), 2000, 0)
    options = (*SMALL, "--max-tiles", "24", "--seed", "3")
    plan = run(tmp_path, *options, tokens=tokens.astype(np.int32), tiles=tiles.astype(np.uint16))
    fits = (tokens <= 4096) & (tiles <= 24)
    np.testing.assert_array_equal(np.sort(plan["sample"]), np.flatnonzero(fits))
    assert plan["pack"].min() == 0 and plan["pack"].max() == 3
    assert sorted(set(plan["step"].tolist())) == list(range(plan["step"].max() + 1))
    number = plan["step"] * 4 + plan["pack"]
    assert (np.diff(number) >= 0).all()
    for values, cap in ((tokens, 4096), (tiles, 24)):
        assert np.bincount(number, values[plan["sample"]]).max() <= cap
    printed = capsys.readouterr().out
    assert f"{int((~fits).sum())} left out" in printed
    for name in ("this planner", "best-fit", "next-fit", "padding", "efficiency", "samples/s"):
        assert name in printed


def test_seeds_and_order(tmp_path: Path) -> None:
    tokens, tiles = MIXES["standard"](np.random.default_rng(0), 1000, 0)
    plans = [
        run(tmp_path, *SMALL, "--seed", seed, tokens=tokens, tiles=tiles)
        for seed in ("1", "1", "2")
    ]
    for name in ("sample", "step", "pack"):
        np.testing.assert_array_equal(plans[0][name], plans[1][name])
    assert not np.array_equal(plans[0]["sample"], plans[2]["sample"])
    # Shuffled: the first step is not made of the file's first samples.
    first = plans[0]["sample"][plans[0]["step"] == 0]
    assert 300 < first.mean() < 700


def test_the_printed_table_is_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Samples of half a pack: every packer fills packs, two samples each."""
    even = np.full(64, 2048)
    run(tmp_path, *SMALL, tokens=even, tiles=np.full(64, 2))
    rows = [line for line in capsys.readouterr().out.splitlines() if "%" in line]
    assert len(rows) == 4  # three packers, and this one with the final step
    for row in rows[:3]:
        assert row[14:].split()[:5] == ["0.00%", "1.000", "1.000", "1.000", "1.000"]
    assert rows[3].endswith("padding 0.00%")


def test_next_fit_closes_packs_in_order() -> None:
    tokens = np.array([4, 5, 9, 1, 10, 2, 3])
    budget = simulate.PackBudget(10, 2)
    ids = np.array([0, 1, 2, 3, 4, 5])
    np.testing.assert_array_equal(
        simulate._next_fit(ids, tokens, budget, 3), [0, 0, 1, 1, 2, 3, -1]
    )


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"tokens": [1, 2]}, "no array 'tiles'"),
        ({"tokens": [1, 2], "tiles": [1]}, "2 tokens .*1 tiles"),
        ({"tokens": [1.5, 2], "tiles": [1, 1]}, "tokens of .*float64"),
        ({"tokens": [[1, 2]], "tiles": [1, 1]}, r"tokens of .*\(1, 2\)"),
        ({"tokens": [1, 2], "tiles": [1, -4]}, "tiles of .* is -4 at sample 1"),
        ({"tokens": [9999], "tiles": [1]}, "none of the samples of .* fits"),
    ],
)
def test_wrong_arrays_are_named(tmp_path: Path, arrays: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(tmp_path, *SMALL, **{name: np.array(values) for name, values in arrays.items()})
    assert not (tmp_path / "plan.npz").exists()


def test_files_that_are_not_npz(tmp_path: Path) -> None:
    for name, data in (("missing.npz", None), ("text.npz", b"tokens"), ("cut.npz", b"PK\x03\x04")):
        path = tmp_path / name
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(InputError, match=rf"cannot read .*{name}"):
            simulate.read_lengths(path)
    np.save(tmp_path / "one.npy", np.arange(3))
    with pytest.raises(InputError, match=r"give an \.npz"):
        simulate.read_lengths(tmp_path / "one.npy")


def test_wrong_options_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--packs-per-step is 0"):
        run(
            tmp_path,
            *("--max-tokens", "10", "--packs-per-step", "0"),
            tokens=np.array([1]),
            tiles=np.array([0]),
        )
