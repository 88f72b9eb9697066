"""A run killed at any point and started again is bitwise the run that was never disturbed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.training.scenarios import DIGITS, tiny_overrides
from training.checkpoint import TEMPORARY
from training.metrics import read_metrics

pytestmark = pytest.mark.multiprocess

STEPS, EVERY = 10, 4
SAME = ("step", "loss", "grad_norm", "lr", "epoch", "data_hash", "tokens", "supervised_tokens")


class Launch:
    """`torchrun --nproc-per-node 2 -m training.train` on a small corpus."""

    def __init__(self, corpus: Path, out: Path, *overrides: str, ranks: int = 2) -> None:
        self.out = out
        settings = [
            *tiny_overrides(corpus),
            f"output_dir={out}",
            f"train.steps={STEPS}",
            f"checkpoint.every_steps={EVERY}",
            "train.log_every=1",
            *overrides,
        ]
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        self.process = subprocess.Popen(
            [sys.executable, *torchrun, "-m", "training.train", DIGITS, *settings],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )

    def finish(self) -> str:
        """Wait for success; returns the output."""
        output, _ = self.process.communicate(timeout=300)
        assert self.process.returncode == 0, output
        return output

    def fail(self) -> str:
        """Wait for failure; returns the output."""
        output, _ = self.process.communicate(timeout=120)
        assert self.process.returncode not in (0, None), output
        return output

    def kill_a_rank(self, when: Callable[[], bool]) -> None:
        """SIGKILL the last rank once `when()` holds; the launcher must end by itself."""
        deadline = time.monotonic() + 240
        while not when():
            assert self.process.poll() is None and time.monotonic() < deadline, self.fail()
            time.sleep(0.005)
        ranks = [
            child
            for child in psutil.Process(self.process.pid).children(recursive=True)
            if "training.train" in child.cmdline()
        ]
        assert len(ranks) == 2
        ranks[-1].send_signal(signal.SIGKILL)
        self.fail()

    def last_step(self) -> int:
        rows = read_metrics(self.out / "metrics.jsonl")
        return rows[-1]["step"] if rows else 0


def comparable(out: Path) -> list[dict[str, Any]]:
    return [{key: row[key] for key in SAME} for row in read_metrics(out / "metrics.jsonl")]


@pytest.fixture(scope="module")
def undisturbed(digits_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    output = Launch(digits_corpus, out).finish()
    assert f"step {STEPS}/{STEPS}" in output and "held-out accuracy" in output
    assert "4 tokens" in output and "64 tokens" in output  # the table
    return out


def test_a_killed_run_ends_as_an_undisturbed_one(
    digits_corpus: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    checkpoints = out / "checkpoints"
    # First inside the first save: nothing is published yet, or the checkpoint is whole.
    Launch(digits_corpus, out).kill_a_rank(lambda: any(checkpoints.glob(TEMPORARY + "*")))
    # Then between two checkpoints.
    launch = Launch(digits_corpus, out)
    launch.kill_a_rank(lambda: launch.last_step() > EVERY + 1)
    assert (checkpoints / "latest").read_text() == f"step-{EVERY:08d}"
    output = Launch(digits_corpus, out).finish()
    assert f"resumed from {checkpoints}/step-{EVERY:08d} at step {EVERY}" in output
    assert [row["step"] for row in comparable(out)] == list(range(1, STEPS + 1))
    assert comparable(out) == comparable(undisturbed)
    assert (out / "evaluation.json").read_bytes() == (undisturbed / "evaluation.json").read_bytes()


def test_a_finished_run_only_evaluates_again(digits_corpus: Path, undisturbed: Path) -> None:
    before = (undisturbed / "metrics.jsonl").read_bytes()
    accuracy = (undisturbed / "evaluation.json").read_bytes()
    output = Launch(digits_corpus, undisturbed).finish()
    assert f"at step {STEPS}" in output and "held-out accuracy" in output
    assert (undisturbed / "metrics.jsonl").read_bytes() == before
    assert (undisturbed / "evaluation.json").read_bytes() == accuracy


def test_the_run_leaves_what_it_says(undisturbed: Path) -> None:
    rows = read_metrics(undisturbed / "metrics.jsonl")
    for key in ("loss", "lr", "grad_norm", "tokens_per_s", "images_per_s", "padding", "data_wait"):
        assert all(key in row for row in rows), key
    assert {"loss_4", "loss_16", "loss_64"} <= {key for row in rows for key in row}
    assert list((undisturbed / "tensorboard").glob("events.*"))
    assert (undisturbed / "curve.png").read_bytes().startswith(b"\x89PNG")
    saved = (undisturbed / "checkpoints").iterdir()
    names = sorted(path.name for path in saved)
    assert names == [".lock", "latest", "step-00000008", "step-00000010"]  # keeps 2
    shards = list((undisturbed / "checkpoints" / "step-00000010").glob("*optim_states.pt"))
    assert len(shards) == 2  # one per rank
    results = json.loads((undisturbed / "evaluation.json").read_text())["results"]
    assert {row["num_image_tokens"] for row in results} == {4, 16, 64}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed=1", r"seed: 0 -> 1"),
        ("data.pack.max_tokens=600", "data.pack"),
        ("data.tokens.probabilities=[0.2, 0.3, 0.5]", "data.tokens"),
    ],
)
def test_resuming_with_other_data_settings_is_refused(
    digits_corpus: Path, undisturbed: Path, override: str, expected: str
) -> None:
    output = Launch(digits_corpus, undisturbed, override).fail()
    assert "belongs to a run with other settings" in output
    assert expected in output


def test_a_later_stage_starts_from_the_weights_of_an_earlier_one(
    digits_corpus: Path, undisturbed: Path, tmp_path: Path
) -> None:
    first = Launch(
        digits_corpus,
        tmp_path / "next",
        f"checkpoint.init_from={undisturbed / 'checkpoints'}",
        "train.steps=1",
        "train.modules.vision_model.train=false",
    ).finish()
    assert f"weights from {undisturbed}/checkpoints/step-00000010" in first
    trained, random = comparable(undisturbed), comparable(tmp_path / "next")
    assert random[0]["data_hash"] == trained[0]["data_hash"]  # the same data as at the start
    assert random[0]["loss"] < 0.9 * trained[0]["loss"]  # but not from random weights


def test_a_run_that_would_start_below_existing_checkpoints_is_refused(
    digits_corpus: Path, undisturbed: Path
) -> None:
    output = Launch(digits_corpus, undisturbed, "checkpoint.resume=never").fail()
    assert "holds step-00000010, later than step 0 where this run starts" in output
    assert (undisturbed / "checkpoints" / "step-00000010").is_dir()


def test_a_new_learning_rate_counts_after_a_resume(
    digits_corpus: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "copy"
    shutil.copytree(undisturbed, out)
    names = ("vision_model", "projector", "language_model")
    rates = [f"train.modules.{name}.lr=1.0e-6" for name in names]
    Launch(digits_corpus, out, *rates, f"train.steps={STEPS + 1}", "train.extend=stretch").finish()
    row = read_metrics(out / "metrics.jsonl")[-1]
    assert row["step"] == STEPS + 1
    assert row["lr"] <= 1e-6
