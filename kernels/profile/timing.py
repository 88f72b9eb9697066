"""Timing a call, and the ceilings of the GPU it runs on.

Everything also runs on a CPU, so that it can be tested there; the times of a CPU are nobody's.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.profile.providers import Call
from kernels.profile.random_inputs import Inputs, backward
from kernels.profile.roofline import Peaks

WARMUP_MS = 100.0
LEAD_CYCLES = 4_000_000  # about 2 ms
MIN_REPEATS, MAX_REPEATS = 10, 5000


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call: median and the 20 % and 80 % quantiles of `repeats` calls.

    host_ms: how long the host takes to issue one call; above the median the host is the limit.
    """

    median_ms: float
    y20_ms: float
    y80_ms: float
    repeats: int
    host_ms: float


Prepare = Callable[[int], Any]  # number of the repetition -> what the timed part is given
Timed = Callable[[Any], Any]


def phases(call: Call, sets: Sequence[Inputs], mode: str) -> tuple[Prepare, Timed]:
    """Split a mode into what comes before the clock starts and what is timed.

    Backward never keeps its graph for a second pass: some implementations overwrite what they
    saved.
    """

    def pick(i: int) -> Inputs:
        return sets[i % len(sets)]

    def forward(inputs: Inputs) -> Tensor:
        return call(inputs.x, inputs.weights)

    if mode == "forward":
        return pick, forward
    if mode == "backward":
        return lambda i: (pick(i), forward(pick(i))), lambda state: backward(*state)
    return pick, lambda inputs: backward(inputs, forward(inputs))


def time_call(prepare: Prepare, timed: Timed, device: torch.device, min_ms: float) -> Timing:
    """Median over at least `min_ms` of timed work, after a warm-up."""
    sample(prepare, timed, device, 3)  # compiles, allocates
    estimate = max(statistics.median(sample(prepare, timed, device, 5)), 1e-3)
    sample(prepare, timed, device, _clamp(min(WARMUP_MS, min_ms) / estimate, 1))
    samples = sample(prepare, timed, device, _clamp(min_ms / estimate, MIN_REPEATS))
    while sum(samples) < min_ms and len(samples) < MAX_REPEATS:  # the estimate was too high
        mean = sum(samples) / len(samples)
        samples += sample(prepare, timed, device, _clamp((min_ms - sum(samples)) / mean, 1))
    y20, median, y80 = quantiles(samples)
    return Timing(median, y20, y80, len(samples), _host_ms(prepare, timed, device))


def _clamp(repeats: float, least: int) -> int:
    return min(max(math.ceil(repeats), least), MAX_REPEATS)


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """The 20 %, 50 % and 80 % quantiles."""
    at = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    y20, median, y80 = torch.tensor(samples, dtype=torch.float64).quantile(at).tolist()
    return y20, median, y80


def sample(
    prepare: Prepare, timed: Timed, device: torch.device, count: int, per_lead: int = 1
) -> list[float]:
    """Milliseconds of each of `count` calls, by CUDA events; the host does not wait in between.

    Before every `per_lead` of them the GPU idles for LEAD_CYCLES, in which the host gets ahead:
    without that, the time of a short call would be the time it takes to launch. A call that takes
    the host longer still counts in full, and `Timing.host_ms` tells.
    """
    if device.type != "cuda":
        return [_host_sample(prepare(i), timed) for i in range(count)]
    events = []
    for i in range(count):
        state = prepare(i)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if i % per_lead == 0:
            torch.cuda._sleep(LEAD_CYCLES)
        start.record()
        result = timed(state)
        end.record()
        del state, result  # before the next call: its memory is used again
        events.append((start, end))
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) for start, end in events]


def _host_sample(state: Any, timed: Timed) -> float:
    started = time.perf_counter()
    timed(state)
    return 1e3 * (time.perf_counter() - started)


def _host_ms(prepare: Prepare, timed: Timed, device: torch.device) -> float:
    """Median time the host takes to issue a call while nothing is queued before it."""
    times = []
    for i in range(5):
        state = prepare(i)
        synchronize(device)
        times.append(_host_sample(state, timed))
        synchronize(device)
    return statistics.median(times)


def synchronize(device: torch.device) -> None:
    """Wait for the GPU; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_peaks(
    device: torch.device,
    dtype: torch.dtype,
    min_ms: float,
    gemm_size: int = 8192,
    copy_bytes: int = 2**30,
) -> Peaks:
    """The ceilings: rate of a large square matrix product, bandwidth of a large copy.

    Bytes are counted read plus written. Random operands: zeros draw less power and run faster.
    """
    gemm_ms = _gemm_ms(device, dtype, min_ms, gemm_size)
    copy_ms = _copy_ms(device, min_ms, copy_bytes)
    return Peaks(2e3 * gemm_size**3 / gemm_ms, 2e3 * copy_bytes / copy_ms)


def _gemm_ms(device: torch.device, dtype: torch.dtype, min_ms: float, size: int) -> float:
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)

    def multiply(_: None) -> Tensor:
        return torch.mm(left, right, out=product)

    return time_call(lambda i: None, multiply, device, min_ms).median_ms


def _copy_ms(device: torch.device, min_ms: float, size: int) -> float:
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return time_call(lambda i: None, lambda _: target.copy_(source), device, min_ms).median_ms
