"""What is recorded beside measured numbers: machine, versions, commit."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import machine


def test_what_is_recorded_beside_numbers() -> None:
    found = machine.measured_on(("numpy", "no-such-package"))
    assert set(found) == {"machine", "load_average", "python", "versions", "commit"}
    assert found["versions"]["numpy"][0].isdigit()
    assert found["versions"]["no-such-package"] == "not installed"
    assert "cores" in found["machine"] or " x " in found["machine"]
    assert machine.num_cores() == len(os.sched_getaffinity(0)) and machine.cpu_model()


def test_the_commit_says_whether_files_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "machine.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert machine.git_commit() is None  # not in a repository

    def git(*words: str) -> Any:
        names = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", "-C", tmp_path, *names, *words], check=True).returncode

    (tmp_path / "file").write_text("one")
    git("init", "--quiet")
    git("add", "file")
    git("commit", "--quiet", "--message", "first")
    commit = machine.git_commit()
    assert commit is not None and len(commit) == 40
    git("tag", "--annotate", "v1", "--message", "a tag")
    (tmp_path / "file").write_text("two")
    assert machine.git_commit() == commit + "+changes"
