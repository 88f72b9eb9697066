"""Writing files and folders so that a reader, or a kill half-way, never sees half of one."""

import fcntl
import hashlib
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_pipeline.errors import InputError

LFS_POINTER = b"version https://git-lfs"
"""How the file begins that Git leaves in place of a large one until `git lfs pull`."""
Seen = Callable[[int], object]
"""Told how many bytes have just been read."""


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` through a temporary file beside it; creates missing folders.

    After a crash the path holds the earlier content or the new one, never a part.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def written_aside(out: Path, check: Callable[[], None]) -> Iterator[Path]:
    """Yield an empty folder beside `out` that becomes `out` when the block ends without error.

    On an error the folder is removed; a killed process can leave only the hidden folder
    ".NAME.partial-..." behind, never something under the name of `out`.

    Args:
        out: the folder to create, or to replace; parents are created as needed.
        check: raises an error where `out` may not be written; called before the block and after
            it, since another process may have finished meanwhile.
    """
    check()
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.partial-{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        yield temporary
        check()
        move_into_place(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def move_into_place(temporary: Path, out: Path) -> None:
    """Rename a finished folder to `out`, instead of what is there; on disk when this returns."""
    for folder in (temporary, *(path for path in temporary.rglob("*") if path.is_dir())):
        sync_folder(folder)
    replaced = temporary.with_name(f"{temporary.name}-replaced")
    if out.exists():
        out.rename(replaced)
    temporary.rename(out)
    sync_folder(out.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Flush a folder's names to disk, so that a rename never outlives what it names."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def file_lock(path: Path, shared: bool = False) -> Iterator[None]:
    """Wait for a lock on `path` and hold it; the kernel drops it should this process die.

    shared: beside others that share it. There is none where the file system has no locks, or where
    another user made the file.
    """
    mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        file = path.open("a+b")
    except PermissionError:
        yield
        return
    with file:
        try:
            fcntl.lockf(file, mode | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            print(f"waiting for another process that works in {path.parent}", file=sys.stderr)
            fcntl.lockf(file, mode)
        except OSError:
            pass
        yield


def check_whole(file: Path, entry: dict[str, Any], seen: Seen = lambda count: None) -> None:
    """Check a file against `{"bytes": n, "sha256": hex}`, noted when it was written.

    Raises:
        InputError: if it is missing or has changed.
    """
    try:
        found = file.stat().st_size
        if found != entry["bytes"]:
            raise InputError(f"{file} has {found} bytes, {entry['bytes']} were written")
        digest = _sha256(file, seen)
    except FileNotFoundError:
        raise InputError(f"{file} is missing") from None
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from error
    if digest != entry["sha256"]:
        raise InputError(f"{file} is damaged: its sha256 is not the one it was saved with")


def _sha256(file: Path, seen: Seen) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(2**22):
            digest.update(chunk)
            seen(len(chunk))
    return digest.hexdigest()
