"""Atomic writes: whole or not at all."""

import os
from pathlib import Path

import pytest

from data_pipeline.files import write_atomically


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
