"""An engine that knows how long forward, backward and update of a step took on its device."""

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from training.engine_interface import Engine


class PhaseTimer:
    """What `training.step.train_step` asks of an engine, passed on and timed.

    On a GPU by events on the stream, read by `take`, so that no phase waits for the device.
    """

    def __init__(self, engine: Engine, device: torch.device) -> None:
        self._engine, self._device = engine, device
        self._marks: list[tuple[str, Any, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        return self._timed("forward", lambda: self._engine(*args, **inputs))

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        self._timed("backward", lambda: self._engine.backward(loss, last=last))

    def step(self) -> float:
        return float(self._timed("update", self._engine.step))

    def take(self) -> dict[str, float]:
        """Seconds per phase since the last call; waits for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds: dict[str, float] = defaultdict(float)
        for name, start, stop in self._marks:
            cuda = self._device.type == "cuda"
            seconds[f"{name}_s"] += start.elapsed_time(stop) / 1e3 if cuda else stop - start
        self._marks = []
        return dict(seconds)

    def _timed(self, name: str, call: Callable[[], Any]) -> Any:
        start = self._now()
        result = call()
        self._marks.append((name, start, self._now()))
        return result

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
