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

from kernels.profile.baselines import Call
from kernels.profile.random_inputs import Inputs, backward, l2_bytes
from kernels.profile.roofline import Peaks

WARMUP_MS = 100.0
LEAD_CYCLES = 4_000_000  # about 2 ms
MIN_REPEATS, MAX_REPEATS = 10, 20_000


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call: least, quartiles and median of `repeats` calls.

    host_ms: how long the host takes to issue one call; above the median the host is the limit.
    """

    lowest_ms: float
    q1_ms: float
    median_ms: float
    q3_ms: float
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


def time_call(
    prepare: Prepare, timed: Timed, device: torch.device, min_ms: float, rest: bool = True
) -> Timing:
    """Median over at least `min_ms` of timed work, after a warm-up. rest: as `sample`'s leads."""

    def run(count: float, least: int) -> list[float]:
        count = min(max(math.ceil(count), least), MAX_REPEATS)
        return sample(prepare, timed, device, count, per_lead=int(rest))

    run(3, 3)  # compiles, allocates
    estimate = max(statistics.median(run(5, 5)), 1e-3)
    run(min(WARMUP_MS, min_ms) / estimate, 1)
    samples = run(min_ms / estimate, MIN_REPEATS)
    while sum(samples) < min_ms and len(samples) < MAX_REPEATS:  # the estimate was too high
        samples += run((min_ms - sum(samples)) * len(samples) / sum(samples), 1)
    at = torch.tensor([0.0, 0.25, 0.5, 0.75], dtype=torch.float64)
    low, q1, median, q3 = torch.tensor(samples, dtype=torch.float64).quantile(at).tolist()
    return Timing(low, q1, median, q3, len(samples), _host_ms(prepare, timed, device))


def sample(
    prepare: Prepare, timed: Timed, device: torch.device, count: int, per_lead: int = 1
) -> list[float]:
    """Milliseconds of each of `count` calls, by CUDA events; the host does not wait in between.

    Before every `per_lead` of them the GPU idles for LEAD_CYCLES, in which the host gets ahead:
    without that, the time of a short call would be the time it takes to launch. A call that takes
    the host longer still counts in full, and `Timing.host_ms` tells. per_lead = 0: no rest ever.
    """
    if device.type != "cuda":
        return [_host_sample(prepare(i), timed) for i in range(count)]
    events = []
    for i in range(count):
        state = prepare(i)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if per_lead and i % per_lead == 0:
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
    device: torch.device, dtype: torch.dtype, min_ms: float, sizes: tuple[int, int] | None = None
) -> Peaks:
    """The ceilings: rate of a large square matrix product, bandwidth of a large copy.

    Bytes are counted read plus written. Random operands: zeros draw less power and run faster.
    sizes: side of the product and bytes of the copy.
    """
    side, copied = sizes or ((8192, 2**30) if device.type == "cuda" else (1024, 2**26))
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    source = torch.randn(copied // 4, device=device)
    target = torch.empty_like(source)

    def rate(amount: float, run: Timed) -> float:
        return 1e3 * amount / time_call(lambda i: None, run, device, min_ms).median_ms

    return Peaks(
        rate(2.0 * side**3, lambda _: torch.mm(left, right, out=product)),
        rate(2.0 * copied, lambda _: target.copy_(source)),
        l2_bytes(device),
    )
