"""One logger's thread: what a service that fails, or hangs, gets can neither end nor slow a run."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Protocol, TypeVar

from training.side_outputs import warn

KEPT_ROWS = 4096
RETRY_S, LONGEST_RETRY_S = 1.0, 60.0
T = TypeVar("T")


@dataclass(frozen=True)
class LoggedRow:
    """Values by their tags: those of a 1-based step, or of the evaluation after it."""

    step: int
    values: dict[str, float]
    evaluation: bool = False

    @property
    def position(self) -> int:
        """The place among all rows of a run, which come in this order, each once."""
        return 2 * self.step + self.evaluation


class Sink(Protocol):
    """What a thread asks of a logger; any call may raise, and is tried again."""

    def begin(self) -> tuple[int, Iterator[LoggedRow]]:
        """Connect: the position of the last row there, and rows that came before this start."""

    def log(self, row: LoggedRow) -> None:
        """Take one row."""

    def finish(self) -> None:
        """Send what is left, and end the run."""


class _GivenUp(Exception):
    """What was tried will not be tried again."""


class LoggerThread:
    """Hands rows to a sink in their order, each once; `add` never waits and never raises.

    What fails is tried again; of more than `KEPT_ROWS` rows that wait, the oldest are dropped and
    counted. The first failure is said, and at the end what is lacking.
    """

    def __init__(self, name: str, sink: Sink) -> None:
        self.name, self.failures, self.lost = name, 0, 0
        self._sink = sink
        self._rows: deque[LoggedRow] = deque()
        self._changed = threading.Condition()
        self._closing = self._busy = False
        self._error = ""
        self._thread = threading.Thread(target=self._run, name=f"logger {name}", daemon=True)
        self._thread.start()

    def add(self, row: LoggedRow) -> None:
        """Have a row logged."""
        with self._changed:
            self._rows.append(row)
            if len(self._rows) > KEPT_ROWS:
                self._rows.popleft()
                self.lost += 1
            self._changed.notify_all()

    def stop(self) -> None:
        """Let the thread end after one more attempt at what waits."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def join(self, timeout_s: float) -> None:
        """Wait for that end, and say what is lacking."""
        self._thread.join(max(timeout_s, 0))
        with self._changed:
            late = self._thread.is_alive()
            lost = self.lost + len(self._rows) + (late and self._busy)
        if lost or late or self.failures:
            why = self._error or "it does not answer"
            warn(f"{self.name} lacks {lost} rows ({self.failures} calls failed): {why}")

    def _run(self) -> None:
        try:
            last, past = self._attempt(self._sink.begin, patient=True)
            for row in chain(past, iter(self._take, None)):
                if row.position > last and self._log(row):
                    last = row.position
            self._attempt(self._sink.finish)
        except _GivenUp:
            pass  # `join` says so

    def _log(self, row: LoggedRow) -> bool:
        try:
            self._attempt(partial(self._sink.log, row))
        except _GivenUp:
            self.lost += 1
            return False
        return True

    def _take(self) -> LoggedRow | None:
        """The next row, waited for; None at the end."""
        with self._changed:
            self._busy = False
            self._changed.wait_for(lambda: self._rows or self._closing)
            self._busy = bool(self._rows)
            return self._rows.popleft() if self._rows else None

    def _attempt(self, job: Callable[[], T], patient: bool = False) -> T:
        """Do it, again and again until it succeeds, the run ends or, unless patient, rows pile up.

        Raises:
            _GivenUp: for the last two.
        """
        pause = RETRY_S
        while True:
            last = self._closing
            try:
                return job()
            except (Exception, SystemExit) as error:  # whatever a package comes up with
                self._failed(f"{type(error).__name__}: {error}")
            with self._changed:
                if last or (len(self._rows) >= KEPT_ROWS and not patient):
                    raise _GivenUp
                self._changed.wait_for(lambda: self._closing, pause)
            pause = min(2 * pause, LONGEST_RETRY_S)

    def _failed(self, error: str) -> None:
        self.failures, self._error = self.failures + 1, error
        if self.failures == 1:
            warn(f"{self.name} fails: {error}; its rows are kept for it, training goes on")
