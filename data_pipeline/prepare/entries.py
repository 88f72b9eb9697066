"""A record of a file and its place, and files opened whatever they are packed with."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from data_pipeline.errors import InputError
from data_pipeline.files import LFS_POINTER
from data_pipeline.storage import Storage


@dataclass(frozen=True)
class Entry:
    """A record, or why it cannot be read; `where` is its place in the file, `number` from 0."""

    where: str
    number: int
    value: Any = None
    fault: InputError | None = None


@dataclass(frozen=True)
class RemoteTable:
    """A parquet file behind a URL; read where it lies, a block at a time."""

    url: str
    storage: Storage

    def __str__(self) -> str:
        return self.url


def _open_zstd(path: Path) -> BinaryIO:
    import pyarrow  # only those who have such files need it

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


def _gzip(path: Path) -> Any:
    return gzip.open(path)


_PACKINGS: dict[bytes, tuple[str, Callable[[Path], Any]]] = {
    b"\x1f\x8b": (".gz", _gzip),
    b"BZh": (".bz2", bz2.open),
    b"\xfd7zXZ": (".xz", lzma.open),
    b"\x28\xb5\x2f\xfd": (".zst", _open_zstd),
}
"""How a packed file begins -> its suffix, and what opens it."""
PACKED = tuple(suffix for suffix, _ in _PACKINGS.values())
UNPACKING_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""What reading a packed file may raise where it is damaged."""


def open_packed(path: Path) -> BinaryIO:
    """The bytes of a file, unpacked as its first bytes say.

    InputError for a text in UTF-16 or a pointer of Git LFS, which no reader takes.
    """
    with path.open("rb") as file:
        start = file.read(len(LFS_POINTER))
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{path} is in UTF-16, expected UTF-8; save it again in UTF-8")
    if start == LFS_POINTER:
        raise InputError(f"{path} is a pointer of Git LFS; fetch the file itself: git lfs pull")
    for magic, (_, opened) in _PACKINGS.items():
        if start.startswith(magic):
            unpacked: BinaryIO = opened(path)
            return unpacked
    return path.open("rb")


def start_of(path: Path, line: bool = False) -> bytes:
    """The first 4096 bytes of a file, unpacked, or its first line; InputError if damaged."""
    try:
        with open_packed(path) as file:
            return file.readline(1 << 20) if line else file.read(4096)
    except UNPACKING_ERRORS as error:
        raise incomplete(path, error) from error


def incomplete(path: Path, error: Exception) -> InputError:
    """For an error of `UNPACKING_ERRORS`."""
    return InputError(f"{path} cannot be read to its end: {error}. Is it complete?")


def record_suffix(path: Path) -> str:
    """The suffix in lower case that says how records are written: ".jsonl" of a.jsonl.gz."""
    inner = path.with_suffix("") if path.suffix.lower() in PACKED else path
    return inner.suffix.lower()
