"""What a run leaves beside its checkpoints: no disk, pipe or broken line ends or slows training."""

import errno
import json
import math
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_pipeline.errors import InputError
from training.checkpoint.lock import FolderLock
from training.config import FaultSettings
from training.distributed import Ranks
from training.health import LossGuard
from training.metrics import MetricsLog, read_evaluations, read_metrics
from training.side_outputs import SideFiles, encode_row, keep_rows, read_rows, side_files

ONE = Ranks(0, 1, 0, torch.device("cpu"))
STEP = {
    **{"loss": 1.5, "grad_norm": 1.0, "lr": 1e-3, "tokens_per_s": 1.0, "images_per_s": 1.0},
    **{"padding": 0.0, "data_wait": 0.0, "memory_gib": 0.0},
}


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file of this process grows beyond `size` bytes: SIGXFSZ and EFBIG, as under `ulimit -f`.

    Like a full disk, it takes the first part of a write.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def files() -> Iterator[SideFiles]:
    found = SideFiles()
    yield found
    found.close()


# Rows


def strictly(text: str) -> Any:
    """As any JSON reader but Python's takes it."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_a_row_is_json_and_comes_back_with_what_is_not_finite(tmp_path: Path) -> None:
    row = {
        "step": 3,
        "loss": math.nan,
        "grad_norm": -math.inf,
        "results": [{"loss": math.inf, "answers": 2}],
    }
    path = tmp_path / "rows.jsonl"
    path.write_bytes(encode_row(row) + b'{"step": 4, "loss": NaN}\n')  # as earlier versions wrote
    found = strictly(path.read_text().splitlines()[0])
    assert found["loss"] is None and found["not_finite"] == {"loss": "nan", "grad_norm": "-inf"}
    first, second = read_rows(path)
    assert math.isnan(first.pop("loss")) and math.isnan(second["loss"])
    assert first == {key: row[key] for key in ("step", "grad_norm", "results")}


BROKEN = [
    b"{not json\n",
    b'{"step": 3, "loss": \xff\xfe}\n',
    b"\0" * 40 + b"\n",
    b"[" * 9999 + b"\n",
]


@pytest.mark.parametrize("broken", BROKEN, ids=["text", "bytes", "zeros", "deep"])
def test_a_broken_line_is_set_aside_and_named_and_costs_no_other(
    tmp_path: Path, files: SideFiles, capsys: pytest.CaptureFixture[str], broken: bytes
) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [b'{"step":%d,  "loss": 2.50}\n' % step for step in range(1, 8)]
    note = b'{"note": "a row of no step"}\n'
    path.write_bytes(b"".join([*rows[:2], broken, note, *rows[2:], b'{"step": 8, "lo']))
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 5, 6, 7]
    keep_rows(path, lambda row: not row.get("step", 0) > 5, files)
    files.flush()
    assert path.read_bytes() == b"".join([*rows[:2], note, *rows[2:5]])  # byte for byte
    assert (tmp_path / "metrics.jsonl.broken").read_bytes() == broken + b'{"step": 8, "lo\n'
    said = capsys.readouterr().err
    assert f"{path}, line 3, is not JSON" in said and "line 10" in said
    assert "set aside in metrics.jsonl.broken" in said


def test_a_file_with_nothing_to_take_out_is_not_touched(tmp_path: Path, files: SideFiles) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2}\n')
    before = path.stat()
    keep_rows(path, lambda row: True, files)
    files.flush()
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_resume_that_cannot_rewrite_the_metrics_leaves_them_and_reads_the_later_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(encode_row({"step": s, "loss": 1.0}) for s in (1, 2, 3, 4)))
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(side_files, "write_atomically", full)
    log = MetricsLog(tmp_path, ONE, 10, 2)
    log.write(3, {**STEP, "loss": 7.0}, show=False)
    log.close()
    assert path.read_bytes() == before  # as after a kill -9 just then
    with path.open("ab") as file:  # or where only appending is possible
        file.write(encode_row({"step": 3, "loss": 7.0}))
    assert [(row["step"], row["loss"]) for row in read_metrics(path)] == [(1, 1), (2, 1), (3, 7)]


def test_an_evaluation_that_comes_again_is_on_record_again(
    tmp_path: Path, files: SideFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = {"detail": "all", "num_image_tokens": 4, "accuracy": 0.5, "loss": 1.0}
    rows = [{"step": step, "loss": 1.0, "results": [result]} for step in (3, 6)]
    path = tmp_path / "evaluations.jsonl"
    path.write_bytes(b"".join(map(encode_row, rows)))
    with monkeypatch.context() as slow:  # the file is rewritten only after it was read
        slow.setattr(files, "_next", lambda: None)
        log = MetricsLog(tmp_path, ONE, 9, 3, files)
        assert list(log.evaluations) == [3]
    log.evaluation(rows[1])
    log.close()
    assert read_rows(path) == rows


def test_the_guard_goes_on_from_rows_without_a_finite_loss() -> None:
    guard = LossGuard(FaultSettings())
    guard.restore([{"step": 1, "loss": loss} for loss in (1.0, None, math.nan, "nan", 2.0)])
    assert list(guard._recent) == [1.0, 2.0]


def test_values_of_other_types_are_passed_over(tmp_path: Path) -> None:
    guard = LossGuard(FaultSettings())
    guard.restore([{"loss": 1.0, "skipped_steps": value} for value in (2, "many", None, [3])])
    assert guard.skipped == 2
    good = {"step": 1, "results": [{"detail": "all", "num_image_tokens": 4, "accuracy": 0.5}]}
    rows = [good, *({"step": 2, "results": value} for value in (5, None, [{}], [3]))]
    (tmp_path / "evaluations.jsonl").write_bytes(b"".join(map(encode_row, rows)))
    assert read_evaluations(tmp_path) == [good]


def test_a_group_may_share_what_a_run_writes(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        files = SideFiles(background=False)
        files.append(tmp_path / "appended", b"row\n")
        files.replace(tmp_path / "in_place", b"row\n", in_place=True)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o664}


# A disk that is full, hangs, or is gone


def test_what_a_full_disk_refuses_is_written_later_whole_and_in_order(
    tmp_path: Path, files: SideFiles, capsys: pytest.CaptureFixture[str]
) -> None:
    log = MetricsLog(tmp_path, ONE, 300, 0, files)
    path = tmp_path / "metrics.jsonl"
    with files_up_to(20_000):
        for step in range(1, 301):
            log.write(step, {**STEP, "loss": float(step)}, show=False)
            if step % 50 == 0:
                files.flush()  # not all rows in one write, however slow the thread is
        lines = path.read_bytes().splitlines(keepends=True)
        assert len(lines) < 200 and lines[-1].endswith(b"}\n")  # no half row
    log.close()
    assert [row["step"] for row in read_metrics(path)] == list(range(1, 301))
    said = capsys.readouterr().err
    assert said.count(f"{path} cannot be written: File too large") == 1
    assert f"{path} can be written again" in said
    found = EventAccumulator(str(tmp_path / "tensorboard"), {"scalars": 0}).Reload()
    values = [(event.step, event.value) for event in found.Scalars("loss")]
    assert values == [(step, step) for step in range(1, 301)]


def test_beyond_a_limit_the_oldest_are_dropped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(side_files, "KEPT_BYTES", 100)
    files, path = SideFiles(), tmp_path / "gone" / "rows.jsonl"
    (tmp_path / "gone").write_text("a file where a folder should be")
    for number in range(30):
        files.append(path, b"%09d\n" % number)
        files.flush()
    (tmp_path / "gone").unlink()
    files.flush()
    assert path.read_bytes() == b"".join(b"%09d\n" % number for number in range(20, 30))
    assert "but for 20 records" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    files.append(tmp_path / "other", b"x")  # a folder, for good
    files.close()
    assert f"{tmp_path / 'other'} lacks 1 records: Is a directory" in capsys.readouterr().err


def test_a_file_system_that_hangs_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(SideFiles.flush, "__defaults__", (0.2,))
    os.mkfifo(tmp_path / "metrics.jsonl")  # opening it waits for a reader
    files = SideFiles()
    began = time.monotonic()
    for _ in range(100):
        files.append(tmp_path / "metrics.jsonl", b"{}\n")
    files.close()
    assert time.monotonic() - began < 5
    assert "metrics.jsonl lacks 100 records: the file system is too slow" in capsys.readouterr().err
    reader = threading.Thread(target=(tmp_path / "metrics.jsonl").read_bytes)
    reader.start()  # lets the thread end
    reader.join()


def test_a_disk_that_is_full_again_and_again_is_said_once(
    tmp_path: Path, files: SideFiles, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    for number in range(4):
        with files_up_to(10 * number + 5):
            files.append(path, b"%09d\n" % number)
            files.flush()
        files.flush()
    assert path.read_bytes() == b"".join(b"%09d\n" % number for number in range(4))
    said = capsys.readouterr().err
    assert said.count("cannot be written") == said.count("can be written again") == 1


def test_half_a_record_is_cut_off_even_where_that_fails_at_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, path = SideFiles(background=False), tmp_path / "rows.jsonl"
    files.append(path, b"first\n")
    real = os.write

    def half(file: int, data: Any) -> int:
        real(file, bytes(data)[:3])
        raise OSError(errno.EIO, "Input/output error")

    def refuse(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(side_files.os, "write", half)
    monkeypatch.setattr(side_files.os, "ftruncate", refuse)
    files.append(path, b"second\n")
    monkeypatch.undo()
    assert path.read_bytes() == b"first\nsec"
    files.flush()
    assert path.read_bytes() == b"first\nsecond\n"


@pytest.mark.parametrize("clock", [0.0, -3600.0], ids=["in order", "set back"])
def test_tensorboard_shows_no_step_twice_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: float
) -> None:
    for first, steps in ((0, range(1, 9)), (4, range(5, 7)), (6, range(7, 10))):
        log = MetricsLog(tmp_path, ONE, 9, first)
        for step in steps:
            log.write(step, {**STEP, "loss": float(100 * first + step)}, show=False)
        log.close()
        now = time.time() + clock
        monkeypatch.setattr("training.metrics.event_file.time.time", lambda now=now: now)
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    values = {event.step: event.value for event in found.Scalars("loss")}
    assert [event.step for event in found.Scalars("loss")] == list(range(1, 10))
    assert values[4] == 4 and values[5] == 405 and values[7] == 607


def test_a_lock_is_taken_on_a_full_disk(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    with files_up_to(0):
        lock.acquire()
        lock.release()


# The console


def on_a_full_disk(script: str) -> int:
    """The exit code of a process whose output goes nowhere."""
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-c", script]
        return subprocess.run(command, stdout=full, stderr=full, timeout=120).returncode


@pytest.mark.parametrize(
    "script",
    [
        "print('x' * 100_000, flush=True) or 75",
        "print('x', file=sys.stderr) or tqdm.write('x' * 10_000) or 75",
        "os.kill(os.getpid(), signal.SIGUSR1) or 75",
    ],
)
def test_a_console_on_a_full_disk_changes_no_exit_code(script: str) -> None:
    setup = (
        "import os, signal, sys; from tqdm import tqdm; from training import exit_codes\n"
        "from training.health.preemption import StopRequest\n"
        f"def main():\n with StopRequest(): return {script}\n"
        "exit_codes.run_rank(main)"
    )
    assert on_a_full_disk(setup) == 75


def test_a_log_has_the_lines_before_a_kill(tmp_path: Path) -> None:
    script = (
        "import os; from training.side_outputs import unfailing_console; unfailing_console()\n"
        "print('step 1')\nos.kill(os.getpid(), 9)"
    )
    with (tmp_path / "log").open("w") as log:
        subprocess.run([sys.executable, "-c", script], stdout=log, timeout=120)
    assert (tmp_path / "log").read_text() == "step 1\n"


def test_what_keeps_a_lock_from_being_taken_is_named(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()
    with pytest.raises(InputError, match=r"/\.lock: Is a directory; make it writable"):
        FolderLock(tmp_path).acquire()
