"""One job per checkpoint folder: an fcntl lock that the kernel drops when its holder dies."""

import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import IO

from data_pipeline.errors import InputError
from training.side_outputs import warn

LOCK = ".lock"
# A process that is just ending may still hold it; after a node loss a network file system keeps
# the lock of a requeued job for its lease time.
WAIT_S, WAIT_FOR_SAME_JOB_S = 3.0, 120.0


class FolderLock:
    """Held from `acquire` until `release` or the end of the process; children do not inherit it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self.file: IO[str] | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            InputError: naming the holder if another job has it, or why there can be no lock.
            TimeoutError: an earlier start of this job still has it, on a node that froze, say:
                a crash, after which the job may start again, while bad input may not.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("a+", encoding="utf-8")
        except OSError as error:
            raise InputError(
                f"cannot write to {error.filename}: {error.strerror}; make it writable, or use "
                "another output_dir"
            ) from error
        started = time.monotonic()
        while not self._try():
            holder = self._holder()
            same_job = holder.get("job") is not None and holder["job"] == _job()
            if time.monotonic() - started > (WAIT_FOR_SAME_JOB_S if same_job else WAIT_S):
                self.file.close()
                self.file = None
                raise (TimeoutError if same_job else InputError)(_in_use(self.path.parent, holder))
            time.sleep(0.1)
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "job": _job(), "since": since}
        self._say(json.dumps(holder))

    def _say(self, holder: str) -> None:
        """Who holds the lock, for others to read: on a full disk nobody learns it."""
        assert self.file is not None
        with suppress(OSError):
            os.ftruncate(self.file.fileno(), 0)
            os.write(self.file.fileno(), holder.encode())

    def _try(self) -> bool:
        assert self.file is not None
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:  # a Lustre mounted without -o flock, say
            warn(
                f"{self.path}: this file system has no locks ({error.strerror}): nothing keeps a "
                "second job out of the folder"
            )
        return True

    def _holder(self) -> dict[str, object]:
        try:
            return dict(json.loads(self.path.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}  # it has the lock, and has not said who it is yet

    def release(self) -> None:
        if self.file is not None:
            self._say("")
            self.file.close()
            self.file = None


def _job() -> str | None:
    return os.environ.get("SLURM_JOB_ID")


def _in_use(folder: Path, holder: dict[str, object]) -> str:
    job = f", Slurm job {holder['job']}" if holder.get("job") else ""
    who = (
        f"process {holder['pid']} on {holder['host']}{job}, since {holder['since']}"
        if holder.get("pid")
        else "another process"
    )
    return (
        f"{folder} is in use by {who}; two jobs must not save into one folder: end that one, or "
        "use another output_dir"
    )
