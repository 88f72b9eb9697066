"""Training on several datasets: their losses, their ends, and what may change on resume."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.chat import ChatSettings
from data_pipeline.index import build_index
from data_pipeline.tokenizer import load_tokenizer
from tests.data_pipeline.small_tokenizers import save_sentencepiece
from tests.ranks import RankPool
from tests.training.mixture_scenarios import datasets, run

pytestmark = pytest.mark.multiprocess


@pytest.fixture(scope="module")
def trained(
    two_ranks: RankPool, digits_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    """Six steps on three datasets, saved after the fourth and the last."""
    out = tmp_path_factory.mktemp("mixture") / "run"
    rows, error = two_ranks.run(
        *(run, digits_corpus, out, *datasets(digits_corpus, "0.3")),
        *("train.steps=6", "checkpoint.every_steps=4"),
    )[0]
    assert not error
    return out, rows


def test_each_dataset_has_its_loss_and_its_epochs(
    trained: tuple[Path, list[dict[str, Any]]],
) -> None:
    _, rows = trained
    for row in rows:
        losses = {
            name: row[f"loss_dataset_{name}"] for name in "abc" if f"loss_dataset_{name}" in row
        }
        assert losses and min(losses.values()) <= row["loss"] <= max(losses.values())
    assert {name for row in rows for name in "abc" if f"loss_dataset_{name}" in row} == set("abc")
    assert all(f"epoch_{name}" in row for row in rows for name in "abc")


def test_a_mixture_resumes_as_if_it_had_not_stopped(
    two_ranks: RankPool, digits_corpus: Path, tmp_path: Path, trained: tuple[Path, list]
) -> None:
    settings = datasets(digits_corpus, "0.3")
    for steps in (3, 6):
        rows, error = two_ranks.run(
            *(run, digits_corpus, tmp_path / "run", *settings),
            *(f"train.steps={steps}", "train.warmup_fraction=0", "train.min_lr_fraction=1"),
        )[0]
        assert not error
    same = ("step", "data_hash", "tokens", "samples", "epoch_a", "epoch_b", "epoch_c")
    expected = [{key: row[key] for key in same} for row in trained[1]]
    assert [{key: row[key] for key in same} for row in rows] == expected


ORDER = {
    "data.datasets.b.weight=5": "data.b.weight: 0.333",
    "data.datasets.b.repeat=7": "data.b.repeat: None -> 7",
    "seed=5": "seed: 0 -> 5",
    "data.tokens.draw=sample": "data.tokens.draw: 'image' -> 'sample'",
}
SHARDS = {
    "data.datasets.d={shards: [TRAIN], weight: 1}": "data.d: None",
    "data.datasets.c.shards=[EVAL]": "data.c.shards: ",
}


@pytest.mark.parametrize("changes", [ORDER, SHARDS], ids=["order", "shards"])
def test_other_data_are_refused_on_resume_or_start_a_window(
    two_ranks: RankPool,
    digits_corpus: Path,
    tmp_path: Path,
    trained: tuple[Path, list],
    changes: dict[str, str],
) -> None:
    out = tmp_path / "run"
    shutil.copytree(trained[0], out)
    settings = [*datasets(digits_corpus, "0.3"), "train.steps=8", "train.extend=stretch"]
    for change in changes:
        change = change.replace("TRAIN", str(digits_corpus / "train"))
        settings.append(change.replace("EVAL", str(digits_corpus / "eval")))
    for rows, error in two_ranks.run(run, digits_corpus, out, *settings):  # every rank says so
        assert all(what in error for what in changes.values()), error
        assert "data.allow_change=true" in error and len(rows) == 6
    rows, error = two_ranks.run(run, digits_corpus, out, *settings, "data.allow_change=true")[0]
    assert not error and [row["step"] for row in rows] == list(range(1, 9))


def test_another_tokenizer_is_refused_on_resume(
    two_ranks: RankPool, digits_corpus: Path, tmp_path: Path, trained: tuple[Path, list]
) -> None:
    """Even where the data were indexed again with it."""
    shutil.copytree(digits_corpus / "train", tmp_path / "train")
    other = save_sentencepiece(tmp_path)
    build_index(str(tmp_path / "train"), load_tokenizer(other), ChatSettings(system=""))
    settings = datasets(tmp_path, "0.3")
    outcomes = two_ranks.run(
        run, digits_corpus, trained[0], *settings, "train.steps=8", f"data.tokenizer={other}"
    )
    for _, error in outcomes:
        assert "data.tokenizer: " in error and "belongs to a run with other settings" in error


def test_another_model_is_refused_whatever_is_allowed(
    two_ranks: RankPool, digits_corpus: Path, trained: tuple[Path, list]
) -> None:
    _, error = two_ranks.run(
        *(run, digits_corpus, trained[0], *datasets(digits_corpus, "0.3")),
        *("train.steps=8", "data.allow_change=true", "model.projector_hidden_ratio=2"),
    )[0]
    assert "belongs to a run with other settings" in error and "allow_change=true" not in error


def test_a_run_ends_with_its_data_and_saves(
    two_ranks: RankPool, digits_corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    settings = [
        "data.shards=[]",
        f"data.datasets={{only: {{shards: [{digits_corpus / 'train'}], repeat: 1}}}}",
        "train.steps=5000",
        "data.pack.max_tokens=4096",
    ]
    rows, error = two_ranks.run(run, digits_corpus, out, *settings)[0]
    assert not error and 0 < len(rows) < 100
    assert sum(row["samples"] for row in rows) == 240
    assert (out / "checkpoints" / "latest").read_text() == f"step-{rows[-1]['step']:08d}"
    again, error = two_ranks.run(run, digits_corpus, out, *settings)[0]
    assert not error and again == rows
    # As it says then: more of the data, in a new window.
    raised = [setting.replace("repeat: 1", "repeat: 2") for setting in settings]
    _, error = two_ranks.run(run, digits_corpus, out, *raised)[0]
    assert "data.only.repeat: 1.0 -> 2.0" in error and "data.allow_change=true" in error
    longer, error = two_ranks.run(run, digits_corpus, out, *raised, "data.allow_change=true")[0]
    assert not error and longer[: len(rows)] == rows and len(longer) > len(rows)
