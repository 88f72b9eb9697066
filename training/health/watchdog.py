"""A thread on every rank that ends it when it makes no progress, and says which rank is to blame.

The main thread beats at every change of phase. Each rank leaves what it last did in
`FOLDER/rank-00003.json`; a rank that gives up reads those of all ranks, names the suspect, leaves
all its threads' stacks in `FOLDER/stacks-rank-00003.txt` and exits with `exit_codes.STUCK`.
"""

import faulthandler
import json
import math
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from training.config import FaultSettings
from training.distributed import Ranks
from training.exit_codes import STUCK
from training.health.suspects import describe, main_thread_place
from training.side_outputs import attempt, shout

# Phases that may take long on one rank while the others wait for it.
PATIENT = frozenset({"startup", "checkpoint_stall", "evaluation", "other"})
_POLL_S = 0.5
_FEWEST_S, _MOST_S = 0.5, 15.0  # between two reports: thousands of ranks share the file system
_GIL_GRACE_S = 10.0


class Watchdog:
    """Watches this rank's main thread from entering to leaving."""

    def __init__(self, folder: Path, ranks: Ranks, settings: FaultSettings) -> None:
        self.folder, self.ranks, self.settings = folder, ranks, settings
        self.report_every_s = min(max(settings.step_timeout_s / 20, _FEWEST_S), _MOST_S)
        self._running = False  # the first step is done
        self._beat = ("startup", 0, time.monotonic(), time.time())
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        attempt("no watchdog reports", lambda: self.folder.mkdir(parents=True, exist_ok=True))
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def beat(self, phase: str, step: int) -> None:
        """The main thread is now in this phase of this step."""
        self._beat = (phase, step, time.monotonic(), time.time())

    def first_step_done(self) -> None:
        """From now on steps are expected within `step_timeout_s`."""
        self._running = True

    @property
    def timeout(self) -> str:
        """The setting that says how long the present phase may last."""
        patient = not self._running or self._beat[0] in PATIENT
        return "startup_timeout_s" if patient else "step_timeout_s"

    @property
    def timeout_s(self) -> float:
        """How long the present phase may last."""
        return float(getattr(self.settings, self.timeout))

    def _watch(self) -> None:
        reported = -math.inf
        while not self._ended.wait(_POLL_S):
            now = time.monotonic()
            left = self.timeout_s - (now - self._beat[2])
            if left < 0:
                self._give_up()
            # Should C code hold the GIL for ever, this thread stands too: a timer without it.
            faulthandler.dump_traceback_later(left + _GIL_GRACE_S, exit=True)
            if now - reported >= self.report_every_s:
                reported = now
                self._report()

    def _report(self) -> None:
        """Leave a sign of life; a full or slow disk must not end the run."""
        path = self.folder / f"rank-{self.ranks.rank:05d}.json"
        temporary = path.with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps(self.status()), encoding="utf-8")
            temporary.replace(path)
        except OSError:
            pass

    def status(self) -> dict[str, Any]:
        """What this rank does; `time` is that of its last beat, `alive` now."""
        phase, step, _, when = self._beat
        return {
            "rank": self.ranks.rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "step": step,
            "phase": phase,
            "time": when,
            "alive": time.time(),
            "place": main_thread_place(),
        }

    def _give_up(self) -> None:
        status, waited = self.status(), time.monotonic() - self._beat[2]
        # A process that was stopped and goes on finds its own clock old: so others name it.
        self._report()
        stacks = self.folder / f"stacks-rank-{self.ranks.rank:05d}.txt"
        try:
            reports = read_reports(self.folder, self.ranks.world_size)
            blame = describe(reports, self.ranks.world_size, time.time(), 3 * self.report_every_s)
        except Exception as error:  # whatever it is: this process must end
            blame = f"the other ranks' reports cannot be read ({error})"
        message = (
            f"error: rank {self.ranks.rank} on {status['host']} made no progress for {waited:.0f} "
            f"s in step {status['step']} ({status['phase']}), {status['place']}. {blame}. If that "
            f"is no hang, raise faults.{self.timeout} ({self.timeout_s:g}). "
            f"Stacks of this rank: {stacks}\n"
        )
        # Not through sys.stderr: the main thread may hang while it holds its lock.
        shout(message)
        faulthandler.dump_traceback(file=2, all_threads=True)
        try:
            with stacks.open("w", encoding="utf-8") as file:
                file.write(message)
                file.flush()
                faulthandler.dump_traceback(file=file, all_threads=True)
        except OSError as error:
            shout(f"the stacks could not be written: {error}\n")
        os._exit(STUCK)


def read_reports(folder: Path, world_size: int) -> dict[int, dict[str, Any]]:
    """What each rank that left a report last did, by rank."""
    reports = {}
    for rank in range(world_size):
        try:
            text = (folder / f"rank-{rank:05d}.json").read_text(encoding="utf-8")
            reports[rank] = json.loads(text)
        except (OSError, ValueError):
            continue
    return reports
