"""`python -m training.bench`: all arms train the same, and what is made of what they noted."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import training.bench.__main__ as command
from data_pipeline.errors import InputError
from data_pipeline.loader import PackedBatch
from training.bench import comparison_table, loss_memory, rounds
from training.bench.arm_record import ArmStep, joined
from training.bench.arms import ARMS, chosen_arms
from training.bench.bench_workload import BenchWorkload
from training.bench.padded_rows import padded_rows
from training.bench.planned_samples import PlannedSample, grouped_by_length

HERE = "packed,padded,grouped,transformers"
SMALL = [
    *("--steps=2", "--samples-per-step=4", "--rounds=1", "--workers=0"),
    *("model.vision.config.num_hidden_layers=1", "model.llm.config.num_hidden_layers=1"),
    *("model.llm.config.hidden_size=32", "model.llm.config.intermediate_size=48"),
]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("bench")
    line = [*SMALL, f"--work={folder / 'work'}", f"--out={folder / 'bench.json'}"]
    command.main([*line, f"--arms={HERE}"])
    return folder, line


def noted(folder: Path, arm: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "work" / "rounds" / f"{arm}-1.json").read_text())
    return found


@pytest.mark.multiprocess
def test_every_arm_trains_every_sample_once(done: tuple[Path, list[str]]) -> None:
    for arm in HERE.split(","):
        run = noted(done[0], arm)
        assert comparison_table.trained(run) == list(range(8)), arm
        assert len(run["steps"]) == 2 and run["memory_gib"] > 0


@pytest.mark.multiprocess
def test_arms_start_from_the_same_weights_and_count_alike(done: tuple[Path, list[str]]) -> None:
    runs = [noted(done[0], arm) for arm in HERE.split(",")]
    first = runs[0]
    for run in runs:
        assert run["held_out_before"] == pytest.approx(first["held_out_before"], rel=1e-6)
        assert run["held_out_after"] < run["held_out_before"]
        for key in ("tokens", "supervised"):
            assert sum(s[key] for s in run["steps"]) == sum(s[key] for s in first["steps"])
    assert all(step["slots"] > step["tokens"] for step in runs[1]["steps"])


@pytest.mark.multiprocess
def test_padded_batches_of_the_same_steps_have_the_same_losses(
    done: tuple[Path, list[str]],
) -> None:
    packed, padded = (noted(done[0], arm)["steps"] for arm in ("packed", "padded"))
    for ours, other in zip(packed, padded, strict=True):
        assert ours["samples"] == other["samples"]
        assert ours["loss"] == pytest.approx(other["loss"], rel=2e-6)


@pytest.mark.multiprocess
def test_the_loss_of_transformers_is_of_the_same_tokens(done: tuple[Path, list[str]]) -> None:
    """Over a step of the same samples the losses are equal; over an epoch near, weights moving."""
    packed, other = (noted(done[0], arm) for arm in ("packed", "transformers"))

    def mean(run: dict[str, Any]) -> float:
        total = sum(step["supervised"] for step in run["steps"])
        return float(sum(step["loss"] * step["supervised"] for step in run["steps"]) / total)

    assert mean(other) == pytest.approx(mean(packed), rel=0.05)
    assert other["held_out_after"] == pytest.approx(packed["held_out_after"], rel=0.05)


@pytest.mark.multiprocess
def test_the_record_and_a_call_again(
    done: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    folder, line = done
    record = json.loads((folder / "bench.json").read_text())
    assert record["arms"].keys() == set(HERE.split(","))
    assert record["times_as_fast_as"].keys() == set(HERE.split(",")[1:])
    assert record["machine"] and record["versions"]["torch"] and "--steps=2" in record["command"]
    assert (folder / "bench.png").stat().st_size
    ran = []

    def fails(line: list[str], **_: Any) -> Any:
        ran.append(line)
        return SimpleNamespace(returncode=1)

    # In that module alone: others ask git for the commit.
    monkeypatch.setattr(rounds, "subprocess", SimpleNamespace(run=fails, DEVNULL=0, STDOUT=0))
    command.main([*line, f"--arms={HERE}"])
    assert not ran and "this trainer: overhead" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"packed .* round 2.*packed-2.log"):
        command.main([*line, f"--arms={HERE}", "--rounds=2"])
    with pytest.raises(InputError, match=r"work holds runs of other settings.*--work"):
        command.main([*line, "--steps=3"])


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["--arms=packed,megatron"], "megatron.*packed, padded, grouped"),
        (["train.no_such=1"], "no_such"),
        (["--out=."], "is a folder"),
    ],
)
def test_bad_input(line: list[str], says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says):
        command.main([f"--work={tmp_path / 'work'}", *line])


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(InputError, match="not empty"):
        BenchWorkload(2, 4, 2).prepare(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("line", [["--warmup=20"], ["--samples-per-step=5"], ["--rounds=0"]])
def test_numbers_that_cannot_be(line: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit):
        command.parse_args(line)
    assert line[0].partition("=")[0] in capsys.readouterr().err


def test_an_arm_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("sys.prefix", "/nowhere")
    if ARMS["trl"].python():
        pytest.skip("TRL is in this environment")
    assert [arm.name for arm in chosen_arms(None)] == HERE.split(",")
    assert "trl" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"trl.*make extras"):
        chosen_arms("packed,trl")


def test_groups_hold_each_sample_once_and_are_of_like_length() -> None:
    none = np.empty(0, np.int64)
    lengths = np.random.default_rng(0).permutation(96).tolist()
    samples = [PlannedSample(i, length, none, none) for i, length in enumerate(lengths)]
    steps = grouped_by_length(samples, 4, 2, seed=0)
    packs = [pack for step in steps for pack in step]
    assert sorted(s for pack in packs for s in pack.sample_ids.tolist()) == list(range(96))
    assert all(len(step) == 2 for step in steps) and len(packs) == 24
    # Four stretches of 24: neighbours of a sorted stretch are 4 apart on average.
    spans = [int(pack.lengths.max() - pack.lengths.min()) for pack in packs]
    assert np.mean(spans) < 20


def test_rows_are_the_samples_of_the_pack() -> None:
    ids = torch.arange(1, 7)
    empty: Any = torch.empty(0)
    pack = PackedBatch(
        input_ids=ids,
        position_ids=ids,
        cu_seqlens=torch.tensor([0, 2, 6], dtype=torch.int32),
        labels=torch.tensor([-100, 2, -100, -100, 5, 6]),
        loss_weights=empty,
        target_positions=empty,
        targets=empty,
        target_weights=empty,
        image_positions=empty,
        tiles=torch.zeros(1, 3, 4, 4, dtype=torch.uint8),
        tile_sides=[2],
        num_images=1,
        num_samples=2,
        sample_ids=[0, 1],
        sample_datasets=[0, 0],
        sample_sides=[2, 0],
        max_seqlen=4,
        planned_tokens=6,
        bad=[],
    )
    rows = padded_rows(pack, 9)
    assert rows["input_ids"].tolist() == [[1, 2, 9, 9], [3, 4, 5, 6]]
    assert rows["labels"].tolist() == [[-100, 2, -100, -100], [-100, -100, 5, 6]]
    assert rows["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert rows["tile_sides"].tolist() == [2]


def run_of(ends: list[float], before: float = 5.0) -> dict[str, Any]:
    """A run whose steps of two samples end then, 0.1 s of each beside the computation."""
    steps = [
        vars(ArmStep([2 * i, 2 * i + 1], 6, 8, 3, 4.0 - i, end, 0.9, 0.05))
        for i, end in enumerate(ends)
    ]
    return {
        "steps": steps,
        "began": 9.0,
        "memory_gib": 1.0,
        "held_out_before": before,
        "held_out_after": 3.0,
    }


def test_measures_by_hand() -> None:
    found = comparison_table.measured(run_of([10.0, 11.0, 12.0]), warmup=1)
    assert found["samples_per_s"] == 2 and found["supervised_per_s"] == 3
    assert found["padding"] == 0.25 and found["data_wait"] == pytest.approx(0.05)
    assert found["overhead"] == pytest.approx(0.1)
    assert comparison_table.measured(run_of([10.0, 11.0]), warmup=0)["samples_per_s"] == 2
    parts = [ArmStep([1], 1, 2, 1, 0.5, 3.0, 1.0, 0.1), ArmStep([0], 2, 2, 1, 0.25, 4.0, 2.0, 0.3)]
    assert joined(parts) == ArmStep([0, 1], 3, 4, 2, 0.75, 4.0, 1.5, 0.2)


def test_ratios_are_of_the_same_round() -> None:
    packed = [run_of([10.0, 11.0, 12.0]), run_of([10.0, 12.0, 14.0])]
    other = [run_of([10.0, 12.0, 14.0]), run_of([10.0, 16.0, 22.0])]
    found = comparison_table.compare({"packed": packed, "padded": other}, 1)
    assert found["times_as_fast_as"]["padded"]["rounds"] == [2, 3]
    spread = found["arms"]["padded"]["samples_per_s"]
    assert spread["least"] == pytest.approx(1 / 3, rel=1e-5) and spread["most"] == 1


def test_arms_that_did_not_train_the_same_are_not_compared() -> None:
    fewer = run_of([10.0, 11.0])
    with pytest.raises(RuntimeError, match="padded trained other samples"):
        comparison_table.compare({"packed": [run_of([1.0, 2.0, 3.0])], "padded": [fewer]}, 1)
    with pytest.raises(RuntimeError, match="padded started at a loss of 6"):
        runs = {"packed": [run_of([1.0, 2.0])], "padded": [run_of([1.0, 2.0], before=6.0)]}
        comparison_table.compare(runs, 1)


def test_sixteen_slices_take_less_than_fifteen_percent() -> None:
    rows = loss_memory.TOKENS
    assert loss_memory._sliced(rows, 16) <= 0.15 * loss_memory._sliced(rows, 1)
