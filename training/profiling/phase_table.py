"""A trace of torch.profiler read as a table: how long each phase took, on the host and the GPU."""

import bisect
import gzip
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.text_table import text_table
from training.profiling.step_phases import PHASES, PREFIX

OTHER = "other"
_ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")

Event = dict[str, Any]


@dataclass
class PhaseTime:
    """One phase over all steps that were traced, in microseconds.

    host_us: between its begin and end, without phases inside of it. gpu_us: of kernels and copies
    that were launched in it, wherever they ran; collective_us: of these, the collectives.
    """

    calls: int = 0
    host_us: float = 0.0
    gpu_us: float = 0.0
    collective_us: float = 0.0


def read_trace(path: Path) -> list[Event]:
    """The complete events of a Chrome trace, plain or gzipped."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [event for event in json.loads(data)["traceEvents"] if event.get("ph") == "X"]


def phase_times(events: list[Event]) -> dict[str, PhaseTime]:
    """Times by phase, in the order of `PHASES`, with `OTHER` for what no phase holds.

    A kernel counts for the phase in which the host launched it, on whichever thread: backward
    launches from threads of autograd. The host's total is from the first event to the last.
    """
    ranges = sorted(
        (event["ts"], event["ts"] + event["dur"], event["name"].removeprefix(PREFIX))
        for event in events
        if event.get("cat") == "user_annotation" and event["name"].startswith(PREFIX)
    )
    times: dict[str, PhaseTime] = defaultdict(PhaseTime)
    spans = _disjoint(ranges)
    for _, _, name in ranges:
        times[name].calls += 1
    for begin, end, name in spans:
        times[name].host_us += end - begin
    launched = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in _LAUNCHES and "correlation" in event.get("args", {})
    }
    starts = [begin for begin, _, _ in spans]
    for event in events:
        if event.get("cat") not in _ON_GPU:
            continue
        name = _at(launched.get(event.get("args", {}).get("correlation")), starts, spans)
        times[name].gpu_us += event["dur"]
        if "nccl" in event["name"].lower():
            times[name].collective_us += event["dur"]
    if events:
        whole = max(e["ts"] + e["dur"] for e in events) - min(e["ts"] for e in events)
        times[OTHER].host_us = whole - sum(time.host_us for time in times.values())
    names = [*PHASES, *sorted(times.keys() - {*PHASES, OTHER}), OTHER]
    return {name: times[name] for name in names if name in times}


def _disjoint(ranges: list[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """Ranges, sorted, that lie in one another, cut so that the innermost counts."""
    spans: list[tuple[float, float, str]] = []
    open_ranges: list[tuple[float, str]] = []  # (end, name), outermost first
    now = 0.0

    def advance(until: float) -> None:
        nonlocal now
        while open_ranges and now < until:
            end, name = open_ranges[-1]
            stop = min(end, until)
            if stop > now:
                spans.append((now, stop, name))
            now = max(now, stop)
            if end <= until:
                open_ranges.pop()
        now = max(now, until)

    for begin, end, name in ranges:
        advance(begin)
        open_ranges.append((end, name))
    advance(float("inf"))
    return spans


def _at(moment: float | None, starts: list[float], spans: list[tuple[float, float, str]]) -> str:
    if moment is None:
        return OTHER
    place = bisect.bisect_right(starts, moment) - 1
    return spans[place][2] if place >= 0 and moment < spans[place][1] else OTHER


def table(times: dict[str, PhaseTime], steps: int) -> str:
    """The times as text, per step; the GPU's columns where it was used."""
    whole = sum(time.host_us for time in times.values()) or 1.0
    on_gpu = any(time.gpu_us for time in times.values())
    rows = [["phase", "calls", "ms", "share"] + ["GPU ms", "collectives ms"] * on_gpu]
    total = PhaseTime(
        host_us=whole,
        gpu_us=sum(time.gpu_us for time in times.values()),
        collective_us=sum(time.collective_us for time in times.values()),
    )
    for name, time in [*times.items(), ("step", total)]:
        calls = f"{time.calls / steps:.3g}" if time.calls else ""
        row = [name, calls, f"{time.host_us / steps / 1000:.2f}", f"{time.host_us / whole:.1%}"]
        if on_gpu:
            row += [f"{us / steps / 1000:.2f}" for us in (time.gpu_us, time.collective_us)]
        rows.append(row)
    return text_table(rows)
