"""A start that is asked to stop ends soon, whatever it waits in: nothing is lost with it."""

import contextlib
import os
import signal
import threading

from training.exit_codes import PREEMPTED
from training.health.preemption import SIGNALS
from training.side_outputs import shout

WAIT_S = 20.0
"""How long a start may go on after a signal; Slurm and torchrun kill after 30 s at the earliest."""


class SlowStart:
    """While entered (on the main thread), a signal of `SIGNALS` ends the process after `wait_s`.

    Most starts are over by then, and all ranks agree to stop before their first step. The others
    may be in a collective, where Python runs no handler, for as long as rank 0 reads or converts a
    checkpoint: a job that then meets its time limit would not go back into the queue. All that a
    start writes may be cut off at any moment, as by a kill.
    """

    def __init__(self, wait_s: float = WAIT_S) -> None:
        self.wait_s = wait_s
        self._over = threading.Event()
        self._told, self._tell = -1, -1
        self._earlier = -1
        self._thread = threading.Thread(target=self._watch, name="slow start", daemon=True)

    def __enter__(self) -> "SlowStart":
        self._told, self._tell = os.pipe()
        os.set_blocking(self._tell, False)
        # The only word of a signal that comes while the main thread is in C code.
        self._earlier = signal.set_wakeup_fd(self._tell, warn_on_full_buffer=False)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.over()

    def over(self) -> None:
        """The start is over: from now on signals wait for the next step, as ever."""
        if self._over.is_set():
            return
        self._over.set()
        signal.set_wakeup_fd(self._earlier)
        with contextlib.suppress(BlockingIOError):  # full: the thread has enough to read
            os.write(self._tell, b"\0")
        self._thread.join()
        os.close(self._tell)
        os.close(self._told)

    def _watch(self) -> None:
        number = 0
        while number not in SIGNALS:
            (number,) = os.read(self._told, 1)
            if self._over.is_set():
                return
        if not self._over.wait(self.wait_s):
            shout(
                f"{signal.Signals(number).name}: asked to stop while the run was starting, and "
                f"{self.wait_s:.0f} s later it still was: ended without a step (process "
                f"{os.getpid()})\n"
            )
            os._exit(PREEMPTED)
