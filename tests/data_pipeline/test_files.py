"""Atomic writes: whole or not at all. Locks: held against other processes."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest

from data_pipeline.files import file_lock, write_atomically


def test_a_write_that_fails_leaves_the_earlier_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new" / "file.bin"
    write_atomically(path, b"first")
    assert path.read_bytes() == b"first"

    def full(_: int) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="disk full"):
            write_atomically(path, b"second")
    assert path.read_bytes() == b"first"
    assert list(path.parent.iterdir()) == [path]
    with path.open("rb") as reader:
        write_atomically(path, b"second")
        assert reader.read() == b"first"  # who has it open keeps a whole file
    assert path.read_bytes() == b"second"


@pytest.mark.parametrize("shared", [False, True])
def test_a_lock_keeps_other_processes_out(tmp_path: Path, shared: bool) -> None:
    path = tmp_path / "lock"

    def can_another(mode: str) -> bool:
        program = (
            f"import fcntl; fcntl.lockf(open({str(path)!r}, 'a+'), fcntl.{mode}|fcntl.LOCK_NB)"
        )
        other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert other.returncode == 0 or "BlockingIOError" in other.stderr
        return other.returncode == 0

    with file_lock(path, shared):
        assert (can_another("LOCK_EX"), can_another("LOCK_SH")) == (False, shared)
    assert can_another("LOCK_EX")


def test_the_lock_of_another_user_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> NoReturn:
        raise PermissionError

    monkeypatch.setattr(Path, "open", refused)
    with file_lock(tmp_path / "lock"):
        pass
