"""Signals that ask a run to stop: remembered here, acted upon at the next step boundary."""

import os
import signal
from types import FrameType
from typing import Any

import torch

from training.distributed import all_reduce_max
from training.side_outputs import shout

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class StopRequest:
    """Notes SIGUSR1 and SIGTERM while it is entered (on the main thread); never interrupts.

    requested: whether this rank got one; other ranks may not have: `agree`, or put it into a
        collective of the step.
    reason: the first signal's name.
    """

    def __init__(self) -> None:
        self.requested = False
        self.reason = ""
        self._earlier: dict[int, Any] = {}

    def __call__(self) -> bool:
        """The same as `requested`, for those who ask for a function."""
        return self.requested

    def __enter__(self) -> "StopRequest":
        for number in SIGNALS:
            self._earlier[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        # Once asked to stop, a further signal must not end the process with another exit code.
        for number, handler in self._earlier.items():
            signal.signal(number, signal.SIG_IGN if self.requested else handler)
        self._earlier = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.requested:
            text = f"{name} again: already stopping after {self.reason}"
        else:
            self.requested, self.reason = True, name
            text = f"{name}: stopping at the next step boundary"
        # print() is not safe here: the signal may have come in the middle of another print().
        shout(f"{text} (process {os.getpid()})\n")

    @property
    def entered(self) -> bool:
        """Whether signals are noted."""
        return bool(self._earlier)

    def agree(self, device: torch.device) -> bool:
        """Whether any rank was asked to stop (one collective; all ranks must call this)."""
        return all_reduce_max([float(self.requested)], device)[0] > 0
