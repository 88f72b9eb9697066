"""`train.epochs`: each sample exactly so often, at any number of ranks, over stops and changes."""

import shutil
from collections import Counter
from pathlib import Path

import pytest

from tests.ranks import RankPool
from tests.training import epoch_scenarios
from tests.training.start_scenarios import Outcome
from training.config import load_config
from training.exit_codes import PREEMPTED

pytestmark = pytest.mark.multiprocess
SAMPLES = 240


def start(
    pool: RankPool, corpus: Path, out: Path, *overrides: str, stop: int = 0
) -> tuple[Outcome, Counter[int]]:
    """Rank 0's outcome, and how often each sample was trained on all ranks."""
    results = pool.run(epoch_scenarios.run, corpus, out, stop, *overrides)
    return results[0][0], Counter(sample for _, ids in results for sample in ids)


@pytest.fixture(scope="module")
def base(
    two_ranks: RankPool, digits_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Outcome, Counter[int]]:
    """Two epochs on two ranks."""
    out = tmp_path_factory.mktemp("epochs") / "base"
    return out, *start(two_ranks, digits_corpus, out, "train.epochs=2")


def test_each_sample_is_trained_once_an_epoch(base: tuple[Path, Outcome, Counter[int]]) -> None:
    out, (code, said, rows), times = base
    assert code == 0 and times == dict.fromkeys(range(SAMPLES), 2)
    last = rows[-1]["step"]
    assert f"2 epochs of {SAMPLES} samples = {last} steps" in said and "data ended" not in said
    train = load_config(out / "config.yaml").train
    assert (train.epochs, train.steps) == (2, last)


def test_stops_and_other_ranks_change_nothing(
    one_rank: RankPool,
    two_ranks: RankPool,
    digits_corpus: Path,
    tmp_path: Path,
    base: tuple[Path, Outcome, Counter[int]],
) -> None:
    (code, _, _), times = start(two_ranks, digits_corpus, tmp_path, "train.epochs=2", stop=3)
    assert code == PREEMPTED
    settled = f"train={{epochs: 2, steps: {len(base[1][2])}}}"  # as config.yaml has it
    (code, said, rows), rest = start(one_rank, digits_corpus, tmp_path, settled)
    assert code == 0 and times + rest == dict.fromkeys(range(SAMPLES), 2) and min(times.values())
    same = ("step", "data_hash", "lr")
    assert [[row[k] for k in same] for row in rows] == [[r[k] for k in same] for r in base[1][2]]
    assert f"= {rows[-1]['step']} steps" in said


def test_more_epochs_extend_a_run_that_ended(
    one_rank: RankPool,
    digits_corpus: Path,
    tmp_path: Path,
    base: tuple[Path, Outcome, Counter[int]],
) -> None:
    out = Path(shutil.copytree(base[0], tmp_path / "run"))
    before = len(base[1][2])
    (error, *_), _ = start(one_rank, digits_corpus, out, "train.epochs=3.5")
    assert f"train.steps {before} -> " in str(error) and "train.extend" in str(error)
    settings = ("train.epochs=3.5", "train.extend=decay")
    (code, said, rows), times = start(one_rank, digits_corpus, out, *settings)
    assert code == 0 and sorted(times.values()) == [1] * 120 + [2] * 120
    end = rows[-1]["step"]
    assert "train.epochs: 2.0 -> 3.5" in said and f"= {end} steps" in said
    parts = ", ".join(str(digits_corpus / part) for part in ("train", "eval"))
    grown = (f"data.shards=[{parts}]", "data.allow_change=true", "train.extend=stretch")
    other = Path(shutil.copytree(base[0], tmp_path / "grown"))
    (code, said, rows), times = start(one_rank, digits_corpus, other, "train.epochs=2", *grown)
    assert code == 0 and times == dict.fromkeys(range(SAMPLES + 24), 2)
    assert f"2 epochs of {SAMPLES + 24} samples = {rows[-1]['step']} steps" in said
    assert len(rows) > before
    (error, *_), _ = start(one_rank, digits_corpus, out, "train.epochs=1")
    assert f"train.epochs=1 lies behind step {end}" in str(error)


def test_another_end_within_the_last_window_is_refused(
    one_rank: RankPool, digits_corpus: Path, tmp_path: Path
) -> None:
    constant = ("train.warmup_fraction=0", "train.min_lr_fraction=1")
    settings = ("data.pack.window_samples=160", *constant)
    first, whole = ("train.epochs=1", *settings), ("train.epochs=2", *settings)
    # The first of the two windows is the same in both plans.
    (code, _, _), times = start(one_rank, digits_corpus, tmp_path, *first, stop=1)
    assert code == PREEMPTED
    (code, _, _), rest = start(one_rank, digits_corpus, tmp_path, *whole)
    assert code == 0 and times + rest == dict.fromkeys(range(SAMPLES), 2)

    inside = tmp_path / "inside"
    one_window = ("data.pack.window_samples=1000", *constant)
    start(one_rank, digits_corpus, inside, "train.epochs=1", *one_window, stop=1)
    (error, *_), _ = start(one_rank, digits_corpus, inside, "train.epochs=2", *one_window)
    assert "train.epochs 1 -> 2" in str(error) and "data.allow_change=true" in str(error)
    (error, *_), _ = start(one_rank, digits_corpus, inside, "train.steps=9", *one_window)
    assert "train.epochs 1 -> null" in str(error)
    again = ("train.epochs=2", "data.allow_change=true", *one_window)
    (code, said, _), times = start(one_rank, digits_corpus, inside, *again)
    assert code == 0 and times == dict.fromkeys(range(SAMPLES), 2)
    assert "1 steps of the old one come again" in said


def test_steps_and_epochs_that_disagree_or_do_not_end_are_refused(
    one_rank: RankPool, digits_corpus: Path, tmp_path: Path
) -> None:
    both = "train={epochs: 1, steps: 5000}"
    (error, *_), _ = start(one_rank, digits_corpus, tmp_path / "both", both)
    assert "train.steps=5000, but train.epochs=1 ends after step" in str(error)
    shards = f"shards: [{digits_corpus / 'train'}]"
    endless = f"data.datasets={{a: {{{shards}, weight: 3, repeat: 1}}, b: {{{shards}, weight: 1}}}}"
    settings = ("data.shards=[]", endless, "train.epochs=1")
    (error, *_), _ = start(one_rank, digits_corpus, tmp_path / "endless", *settings)
    assert "train.epochs=1" in str(error) and "b" in str(error) and "repeat" in str(error)
    assert "train.steps" in str(error)
