"""An engine that notes how long its forward, backward and optimizer calls take."""

import time
from typing import Any, NamedTuple

from torch import Tensor

from training.bench.arm_record import peak_memory
from training.engine_interface import Engine


class StepEnd(NamedTuple):
    """When a step ended, the seconds of its engine calls, and the process's peak memory by then."""

    end: float
    compute: float
    memory_gib: float


class TimedEngine:
    """Another engine whose calls are timed; whatever else is asked of it, the other one answers."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._compute = 0.0
        self.ends: list[StepEnd] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        began = time.perf_counter()
        output = self._engine(*args, **inputs)
        self._compute += time.perf_counter() - began
        return output

    def backward(self, loss: Tensor, last: bool) -> None:
        """The engine's, timed."""
        began = time.perf_counter()
        self._engine.backward(loss, last)
        self._compute += time.perf_counter() - began

    def step(self) -> float:
        """The engine's, timed; a step ends with it."""
        began = time.perf_counter()
        norm = self._engine.step()
        now = time.perf_counter()
        self.ends.append(StepEnd(now, self._compute + now - began, peak_memory()))
        self._compute = 0.0
        return norm
