"""Evaluations on the way: none is forgotten over a restart, all are on record, the best is kept."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_pipeline.errors import InputError
from tests.ranks import RankPool
from tests.training.evaluation_scenarios import run
from tests.training.scenarios import tiny_config
from training import exit_codes
from training.checkpoint.__main__ import main as checkpoint_command
from training.checkpoint.pruning import SCORES, best, to_prune, write_scores
from training.distributed import Ranks
from training.evaluate import in_training
from training.evaluate.in_training import ALL, Score
from training.metrics.run_curve import plot_run
from training.side_outputs import SideFiles

ONE = Ranks(0, 1, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def undisturbed(
    two_ranks: RankPool, digits_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("evaluations") / "run"
    return out, two_ranks.run(run, digits_corpus, out, {})[0]


@pytest.mark.multiprocess
def test_every_evaluation_is_on_record_with_its_loss(
    undisturbed: tuple[Path, dict[str, Any]],
) -> None:
    out, found = undisturbed
    assert [row["step"] for row in found["rows"]] == [2, 4, 6, 8]
    for row in found["rows"]:
        overall = [r for r in row["results"] if r["detail"] == "all"]
        assert [r["num_image_tokens"] for r in overall] == [4, 16, 64]
        assert all(r["answers"] == 7 for r in overall)  # eval.max_samples
        assert row["loss"] == pytest.approx(sum(r["loss"] for r in overall) / 3)
    losses = [row["loss"] for row in found["rows"]]
    assert losses[0] > losses[-1] > 0  # it learns
    last = [{k: v for k, v in r.items() if k != "loss"} for r in found["rows"][-1]["results"]]
    assert found["final"] == {"step": 8, "results": last}
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("eval_loss/all/16")] == [2, 4, 6, 8]
    assert [event.step for event in events.Scalars("accuracy/all/16")] == [2, 4, 6, 8]


def test_a_sample_without_a_level_of_detail_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside ten wrong answers of a level, one right one without."""
    scored = [
        (0, Score(1, 1, 2, 2, 3, 0.5)),
        *((i, Score(1, 0, 2, 0, 3, 1.0)) for i in range(1, 11)),
    ]
    levels = {0: ALL} | dict.fromkeys(range(1, 11), "k=1")
    monkeypatch.setattr(in_training, "sample_details", lambda *_: levels)
    monkeypatch.setattr(in_training, "model_inputs", lambda *_: {})
    monkeypatch.setattr(in_training, "score_answers", lambda *_: scored)
    monkeypatch.setattr(in_training, "all_reduce_sum", lambda values, _: values)
    plan = Mock(packs=lambda side: [None])
    found = in_training.evaluate(Mock(), plan, Mock(), [2], ONE)
    assert found is not None
    assert found.scores[ALL, 4] == Score(11, 1, 22, 2, 33, 10.5)
    assert found.scores["k=1", 4] == Score(10, 0, 20, 0, 30, 10.0)


@pytest.mark.multiprocess
def test_an_evaluation_that_was_cut_short_is_made_up(
    two_ranks: RankPool,
    digits_corpus: Path,
    undisturbed: tuple[Path, dict[str, Any]],
    tmp_path: Path,
) -> None:
    """The second, of step 4, whose checkpoint is saved; then its repetition; then it is done."""
    out, expected = tmp_path / "run", undisturbed[1]
    for faults, code, asked in (
        ({2: "stopped"}, exit_codes.PREEMPTED, [2, 4]),
        ({1: "crash"}, None, [4]),
        ({}, exit_codes.OK, [4, 6, 8]),
    ):
        found = two_ranks.run(run, digits_corpus, out, faults)[0]
        assert (found["code"], found["asked"]) == (code, asked)
    assert found["rows"] == expected["rows"] and found["lines"] == 4
    assert (found["saved"], found["best"]) == (expected["saved"], expected["best"])
    again = two_ranks.run(run, digits_corpus, out, {})[0]  # a finished run: its last one only
    assert (again["asked"], again["lines"]) == ([8], 4)


@pytest.mark.multiprocess
def test_the_best_checkpoint_stays_over_restarts_on_other_ranks_and_pruning(
    one_rank: RankPool,
    two_ranks: RankPool,
    digits_corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    # A rate at which the loss soon rises again.
    names = ("vision_model", "projector", "language_model")
    rates = [f"train.modules.{name}.lr=0.5" for name in names]
    steady = [*rates, "train.warmup_fraction=0", "train.min_lr_fraction=1"]
    for pool, steps in ((two_ranks, 6), (one_rank, 12)):
        found = pool.run(run, digits_corpus, out, {}, *steady, f"train.steps={steps}")[0]
    losses = {row["step"]: row["loss"] for row in found["rows"]}
    top = min(losses, key=lambda step: losses[step])
    assert top < 9, losses  # else nothing is shown
    assert found["best"] == (f"step-{top:08d}", losses[top])
    assert found["saved"] == [top, 10, 12]
    folder = str(out / "checkpoints")
    assert checkpoint_command(["prune", folder, "--keep", "1"]) == 0
    assert checkpoint_command(["list", folder]) == 0
    said = capsys.readouterr().out
    assert f"best (loss {losses[top]:.4g})" in said and "removed step-00000010" in said
    assert (out / "checkpoints" / f"step-{top:08d}").is_dir()


def folder_of(path: Path, steps: list[int]) -> Path:
    for step in steps:
        (path / f"step-{step:08d}").mkdir(parents=True)
        (path / f"step-{step:08d}" / "manifest.json").write_text("{}")
    return path


@pytest.mark.parametrize(
    ("metric", "kept"), [("accuracy", 2), ("loss", 3), (None, None)], ids=["up", "down", "off"]
)
def test_what_is_pruned_beside_the_best(tmp_path: Path, metric: str | None, kept: int) -> None:
    folder = folder_of(tmp_path, [1, 2, 3, 5, 6])
    rows = {
        1: {"accuracy": 0.1, "loss": float("nan")},
        2: {"accuracy": 0.9, "loss": 2.0},
        3: {"accuracy": 0.9, "loss": 0.5},  # an equal: the earlier one
        4: {"accuracy": 1.0, "loss": 0.1},  # its save failed
    }
    (folder / SCORES).write_text("left over")
    write_scores(folder, metric, rows, SideFiles(background=False))
    found = best(folder)
    assert (found and int(found.path.name[-8:])) == kept
    assert [int(p.name[-8:]) for p in to_prune(folder, 2, 0)] == [s for s in (1, 2, 3) if s != kept]


def test_scores_that_cannot_be_read_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder_of(tmp_path, [1, 2]) / SCORES).write_text('{"metric": ')
    assert [path.name for path in to_prune(tmp_path, 1, 0)] == ["step-00000001"]
    assert f"{SCORES} cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    "overrides",
    [
        ["eval.every_steps=0"],
        ["eval.every_steps=3", "checkpoint.every_steps=2"],
    ],
)
def test_a_best_that_nobody_could_know_is_refused(tmp_path: Path, overrides: list[str]) -> None:
    with pytest.raises(InputError, match=r"keep_best.*eval\.every_steps"):
        tiny_config(tmp_path, "checkpoint.keep_best=accuracy", *overrides)


def test_the_curve_shows_the_history(tmp_path: Path) -> None:
    def history(steps: int) -> None:
        result = {"detail": "all", "num_image_tokens": 4, "accuracy": 0.5, "loss": 1.0}
        rows = [{"step": s, "loss": 1.0, "results": [result]} for s in range(steps)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "evaluations.jsonl").write_text(text)

    sizes = []
    for steps in (0, 1, 3):
        history(steps)
        plot_run(tmp_path, {"all": {4: 0.5}}, tmp_path / "curve.png")
        sizes.append(int.from_bytes((tmp_path / "curve.png").read_bytes()[16:20], "big"))
    assert sizes == [1440, 1440, 2160]
