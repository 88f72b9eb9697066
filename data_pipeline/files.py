"""Writing files so that a reader, or a process killed half-way, never sees half of one."""

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
