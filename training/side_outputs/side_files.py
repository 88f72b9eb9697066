"""Files that a run leaves for people, written by a thread that can neither end nor slow it.

One rule for all of them: what cannot be written (a full disk, a quota, a limit, a file system that
hangs) is kept and written later; beyond `KEPT_BYTES` a file the oldest records are dropped and
counted. A warning says so when it begins and how it ended.
"""

import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.files import write_atomically
from training.side_outputs.console import warn

KEPT_BYTES = 16 * 2**20
RETRY_S = 1.0
SAY_AGAIN_S = 60.0
"""Fewest seconds between two warnings of a file that can be written now and then."""
CLOSE_S = 5.0
"""Longest wait for the last records: a disk that hangs must not keep a run from ending."""


@dataclass
class _Waiting:
    """What is yet to be written to one file: `content` in place of what is there, then records."""

    content: bytes | None = None
    in_place: bool = False
    records: deque[bytes] = field(default_factory=deque)
    size: int = 0
    end: int | None = None
    """Bytes of the file that are good, after an attempt that failed half-way."""
    taken: int = 0
    """Records of an attempt that is under way."""
    lost: int = 0
    trouble: str = ""
    said_at: float = -math.inf
    quiet: bool = False
    """The trouble was not said: the last one was a moment ago."""
    retry_at: float = 0.0

    @property
    def empty(self) -> bool:
        return self.content is None and not self.records

    def add(self, records: deque[bytes]) -> None:
        self.records += records
        self.size += sum(map(len, records))
        while self.size > KEPT_BYTES:
            self.size -= len(self.records.popleft())
            self.lost += 1

    def take(self) -> tuple[bytes | None, deque[bytes]]:
        content, records = self.content, self.records
        self.content, self.records, self.size = None, deque(), 0
        return content, records

    def put_back(self, content: bytes | None, records: deque[bytes]) -> None:
        """What could not be written, before what has come since, unless that replaces it."""
        if self.content is None:
            since = self.take()[1]
            self.content = content
            self.add(records)
            self.add(since)


class SideFiles:
    """Appends to files and replaces them; no call raises for a disk, none waits but `flush`.

    Args:
        background: write in a thread; else within each call.
    """

    def __init__(self, background: bool = True) -> None:
        self._files: dict[Path, _Waiting] = {}
        self._changed = threading.Condition()
        self._busy: Path | None = None
        self._thread: threading.Thread | None = None
        self._background = background

    def append(self, path: Path, record: bytes) -> None:
        """Add a record, whole or not at all, at the end of a file."""
        self._change(path, lambda waiting: waiting.add(deque([record])))

    def replace(self, path: Path, content: bytes, in_place: bool = False) -> None:
        """Make this a file's content: atomically, or over its first bytes (`in_place`)."""

        def change(waiting: _Waiting) -> None:
            waiting.take()
            waiting.content, waiting.in_place, waiting.end = content, in_place, None

        self._change(path, change)

    def flush(self, timeout_s: float = CLOSE_S) -> None:
        """Try once more to write what waits, and wait for it."""
        with self._changed:
            for waiting in self._files.values():
                waiting.retry_at = 0.0
            self._changed.notify_all()
            if self._background:
                self._changed.wait_for(lambda: self._next() is None and not self._busy, timeout_s)
                return
        self._write_due()

    def close(self) -> None:
        """`flush`, and say what could not be written; later calls write by themselves."""
        self.flush()
        with self._changed:
            left, self._files = self._files, {}
            self._background = False
            self._changed.notify_all()
        for path, waiting in left.items():
            lost = waiting.lost + waiting.taken + len(waiting.records)
            if lost or not waiting.empty:
                what = f"{lost} records" if lost else "its newest content"
                warn(f"{path} lacks {what}: {waiting.trouble or 'the file system is too slow'}")

    def _change(self, path: Path, change: Callable[[_Waiting], None]) -> None:
        with self._changed:
            change(self._files.setdefault(path, _Waiting()))
            self._changed.notify_all()
            if self._background and self._thread is None:
                self._thread = threading.Thread(target=self._run, name="side files", daemon=True)
                self._thread.start()
        if not self._background:
            self._write_due()

    def _run(self) -> None:
        while self._background:
            with self._changed:
                self._changed.wait_for(
                    lambda: not self._background or self._next() is not None, RETRY_S
                )
            self._write_due()

    def _next(self) -> Path | None:
        now = time.monotonic()
        due = (p for p, w in self._files.items() if not w.empty and w.retry_at <= now)
        return next(due, None)

    def _write_due(self) -> None:
        while True:
            with self._changed:
                self._busy = path = self._next()
                self._changed.notify_all()
                if path is None:
                    return
                waiting = self._files[path]
                content, records = waiting.take()
                waiting.taken = len(records)
            error = _write(path, waiting, content, b"".join(records))
            news = None
            with self._changed:
                waiting.taken = 0
                if error is not None or waiting.trouble:
                    news = _settle(path, waiting, error)
                if error is not None:
                    waiting.put_back(content, records)
            if news:
                warn(news)  # which may have to wait, too


def _write(path: Path, waiting: _Waiting, content: bytes | None, data: bytes) -> Exception | None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            _append(path, data, waiting)
        elif waiting.in_place:
            _overwrite(path, content)
        else:
            write_atomically(path, content + data)
    except Exception as error:  # the thread must outlive whatever it is
        return error
    return None


def _settle(path: Path, waiting: _Waiting, error: Exception | None) -> str | None:
    """What there is to say of an attempt that failed, or that went well after one that did."""
    before, waiting.trouble = waiting.trouble, ""
    if error is None:
        lost, waiting.lost = waiting.lost, 0
        if waiting.quiet and not lost:
            return None
        but = f" but for {lost} records" if lost else ""
        return f"{path} can be written again: all is there{but}"
    waiting.trouble = getattr(error, "strerror", None) or str(error)
    now = time.monotonic()
    waiting.retry_at = now + RETRY_S
    if not before:
        waiting.quiet = now - waiting.said_at < SAY_AGAIN_S
    if before or waiting.quiet:
        return None
    waiting.said_at = now
    return f"{path} cannot be written: {waiting.trouble}; it is kept for later, training goes on"


def _append(path: Path, data: bytes, waiting: _Waiting) -> None:
    """All of `data` at the end, or nothing: a half that a full disk took is cut off again."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        end = os.fstat(file).st_size
        if waiting.end is not None and end > waiting.end:
            os.ftruncate(file, waiting.end)
            end = waiting.end
        waiting.end = end  # should this attempt fail, or the next cut not be possible now
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(file, rest) :]
        except OSError:
            os.ftruncate(file, end)
            raise
    finally:
        os.close(file)  # on a network file system, the first to say that the disk is full
    waiting.end = None


def _overwrite(path: Path, data: bytes) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        os.pwrite(file, data, 0)
    finally:
        os.close(file)
