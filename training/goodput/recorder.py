"""Rank 0's record of where the wall time goes: goodput.jsonl, and goodput.live of the present.

The live file is overwritten in place, about once a second, so that a process that is killed loses
no more than that; the next one turns it into an event.
"""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from training.distributed import Ranks
from training.side_outputs import SideFiles, encode_row, keep_rows, read_rows

EVENTS, LIVE = "goodput.jsonl", "goodput.live"
PHASES = ("startup", "steps", "data_wait", "checkpoint_stall", "evaluation", "other")
STATE = {"event", "start", "time", "first_step", "step", "stalls", "seconds"}
_LIVE_EVERY_S = 1.0
_LIVE_BYTES = 1024  # one write, padded: a reader never sees the end of a longer one


class Goodput:
    """Times the phases of this process; they add up to its age. Ranks but 0 record nothing.

    Time is `startup` until `ready`, `steps` afterwards, and that of a `phase` within one.

    Args:
        since: time.time() at the process's start, where that is not when Python started.
        files: what writes the record; None: each call by itself.
    """

    def __init__(
        self,
        output_dir: Path,
        ranks: Ranks,
        since: float | None = None,
        files: SideFiles | None = None,
    ) -> None:
        self.is_main = ranks.is_main
        self.first_step = self.step_done = 0
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.stalls = 0
        self._phase = "startup"
        if not self.is_main:
            return
        self.files = files or SideFiles(background=False)
        self.path, self._live_path = output_dir / EVENTS, output_dir / LIVE
        earlier = self._adopt_killed()
        since = psutil.Process().create_time() if since is None else since
        # A clock that was set back must not let this process begin before the last one ended.
        since = min(max(since, earlier), time.time())
        # From here on only the monotonic clock counts: the other one may be set at any time.
        self._started, self._origin = since, time.monotonic() - (time.time() - since)
        self._entered, self._live_written = self._origin, 0.0
        where = {"host": socket.gethostname(), "pid": os.getpid()}
        job = {"job": os.environ["SLURM_JOB_ID"]} if "SLURM_JOB_ID" in os.environ else {}
        self._event("start", world_size=ranks.world_size, **where, **job)
        self._write_live(time.monotonic())

    def _adopt_killed(self) -> float:
        """Append the live record of a process that could not say that it ended; the last time."""
        keep_rows(self.path, lambda row: True, self.files)
        events, live = read_events(self.path), read_events(self._live_path)
        if not events:
            return 0.0
        last = float(events[-1]["time"])
        if live and events[-1]["event"] != "end" and live[-1]["start"] == events[-1]["start"]:
            if live[-1]["time"] > last:
                self.files.append(self.path, encode_row(live[-1]))
            last = max(last, float(live[-1]["time"]))
        return last

    def ready(self, step: int) -> None:
        """The first step after `step` begins: what is in no phase is now a step's."""
        self.first_step = self.step_done = step
        self._switch("steps")
        if self.is_main:
            self._event("ready")

    def step(self, step: int) -> None:
        """A step is done."""
        self.step_done = step
        if self.is_main:
            now = time.monotonic()
            if now - self._live_written >= _LIVE_EVERY_S:
                self._switch(self._phase)
                self._write_live(now)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time spent inside is the phase's; phases may be nested, the inner one counts."""
        outer = self._phase
        self._switch(name)
        try:
            yield
        finally:
            self._switch(outer)
            if name == "checkpoint_stall":
                self.stalls += 1
                # So that the cost of the steps before a checkpoint is known to the second.
                if self.is_main:
                    self._event("checkpoint")

    def end(self, reason: str) -> None:
        """The process ends: "finished", "preempted", or what went wrong."""
        if self.is_main:
            self._event("end", reason=reason)
            self.files.flush()  # or the live file might be written after it is removed
            with suppress(OSError):
                self._live_path.unlink(missing_ok=True)
            self.is_main = False

    def _switch(self, name: str) -> None:
        """Charge the time since the last switch to the phase that was on."""
        if self.is_main:
            now = time.monotonic()
            self.seconds[self._phase] += now - self._entered
            self._entered = now
        self._phase = name

    def _state(self, event: str) -> dict[str, Any]:
        self._switch(self._phase)
        return {
            "event": event,
            "start": self._started,
            "time": self._started + self._entered - self._origin,
            "first_step": self.first_step,
            "step": self.step_done,
            "stalls": self.stalls,
            "seconds": {name: round(value, 4) for name, value in self.seconds.items()},
        }

    def _event(self, event: str, **more: Any) -> None:
        self.files.append(self.path, encode_row(self._state(event) | more))

    def _write_live(self, now: float) -> None:
        row = encode_row(self._state("killed"))
        self.files.replace(self._live_path, row.ljust(_LIVE_BYTES), in_place=True)
        self._live_written = now


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of goodput.jsonl in order, without what a crash or a hand left broken."""
    return [row for row in read_rows(path) if row.keys() >= STATE and _is_whole(row)]


def _is_whole(row: dict[str, Any]) -> bool:
    seconds = row["seconds"]
    numbers = [row[key] for key in STATE - {"event", "seconds"}]
    return isinstance(seconds, dict) and all(
        isinstance(number, int | float) for number in (*numbers, *seconds.values())
    )
