"""Signals that ask a run to stop: remembered here, acted upon at the next step boundary."""

import os
import signal
import time
from types import FrameType
from typing import Any

import torch

from training.distributed import all_reduce_max
from training.side_outputs import shout

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
AGAIN_S = 0.5
"""Two Ctrl-C so close are one: a launcher in the same terminal passes it on."""


class StopRequest:
    """Notes `SIGNALS` while it is entered (on the main thread); only a second Ctrl-C interrupts.

    requested: whether this rank got one; other ranks may not have: `agree`, or put it into a
        collective of the step.
    reason: the first signal's name.
    """

    def __init__(self) -> None:
        self.requested = False
        self.reason = ""
        self._earlier: dict[int, Any] = {}
        self._terminals: list[int] = []
        self._interrupted: float | None = None

    def __call__(self) -> bool:
        """The same as `requested`, for those who ask for a function."""
        return self.requested

    def __enter__(self) -> "StopRequest":
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        for number in SIGNALS:
            # As nohup leaves SIGHUP, and a shell SIGINT of what it runs in the background.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._earlier[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        # Once asked to stop, a further signal must not end the process with another exit code.
        for number, handler in self._earlier.items():
            signal.signal(number, signal.SIG_IGN if self.requested else handler)
        self._earlier = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGHUP:
            self._leave_terminal()
        if number == signal.SIGINT:
            self._end_if_again()
        if self.requested:
            text = f"{name} again: already stopping after {self.reason}"
        else:
            self.requested, self.reason = True, name
            text = f"{name}: stopping at the next step boundary"
            text += "; Ctrl-C again ends at once" * (number == signal.SIGINT)
        # print() is not safe here: the signal may have come in the middle of another print().
        shout(f"{text} (process {os.getpid()})\n")

    def _leave_terminal(self) -> None:
        """The terminal is gone: a word to it would be an error, and end the run before it saves."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in self._terminals:
            os.dup2(nowhere, descriptor)
        os.close(nowhere)

    def _end_if_again(self) -> None:
        now = time.monotonic()
        if self._interrupted is None:
            self._interrupted = now
        elif now - self._interrupted > AGAIN_S:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)

    @property
    def entered(self) -> bool:
        """Whether signals are noted."""
        return bool(self._earlier)

    def agree(self, device: torch.device) -> bool:
        """Whether any rank was asked to stop (one collective; all ranks must call this)."""
        return all_reduce_max([float(self.requested)], device)[0] > 0
