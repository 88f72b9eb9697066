"""Atomic writes of files and folders: whole or not at all. Locks: held against others."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest

from data_pipeline import files
from data_pipeline.files import file_lock, move_into_place, write_atomically, written_aside


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


def test_a_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    checked: list[bool] = []

    def check() -> None:
        checked.append(out.exists())

    with pytest.raises(ValueError, match="half-way"), written_aside(out, check) as folder:
        (folder / "a").write_text("first")
        raise ValueError("half-way")
    assert list(out.parent.iterdir()) == [] and checked == [False]
    with written_aside(out, check) as folder:
        (folder / "a").write_text("first")
        assert not out.exists()
    assert (out / "a").read_text() == "first"
    with written_aside(out, check) as folder:
        (folder / "b").write_text("second")
    assert [path.name for path in out.iterdir()] == ["b"]  # replaced, not mixed
    assert list(out.parent.iterdir()) == [out]
    assert checked == [False, False, False, True, True]


def test_a_folder_that_came_meanwhile_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "folder"

    def check() -> None:
        if out.exists():
            raise FileExistsError("taken")

    with pytest.raises(FileExistsError, match="taken"), written_aside(out, check):
        out.mkdir()
        (out / "theirs").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "theirs"]


def test_names_are_on_disk_before_a_folder_is_renamed_and_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, bool]] = []
    out = tmp_path / "out"
    (tmp_path / "aside" / "part").mkdir(parents=True)
    monkeypatch.setattr(files, "sync_folder", lambda f: synced.append((f.name, out.exists())))
    move_into_place(tmp_path / "aside", out)
    assert synced == [("aside", False), ("part", False), (tmp_path.name, True)]


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
