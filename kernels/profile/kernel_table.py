"""Where the time of a call goes: its kernels, what each reaches, and the gaps between them.

Read off a Chrome trace of torch.profiler (ui.perfetto.dev shows those that are kept). On a CPU
torch's ops stand for kernels, each with the time spent in itself.
"""

import gzip
import json
import math
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from kernels.profile.cases import Case
from kernels.profile.roofline import Peaks, steps
from kernels.profile.timing import LEAD_CYCLES, synchronize

CALLS = 3
RANGE = "one call"
IDLE = "spin_kernel"  # of torch.cuda._sleep, which lets the host get ahead before each call
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
SIZES = {"float": 4, "c10::BFloat16": 2, "c10::Half": 2, "double": 8, "long int": 8, "int": 4}
# Ops whose result is far smaller than what they read, or among what they are given (Inductor's).
REDUCING = ("pool2d", "sum", "upsample", "copy_", "fill_", "zero_", "triton_")


@dataclass
class Launch:
    """One kernel of a trace, and the op that it came from, or an op of a CPU; microseconds."""

    name: str
    start: float
    us: float
    op: dict[str, Any]
    on_gpu: bool


def traced(
    run: Callable[[], object],
    case: Case | None,
    device: torch.device,
    peaks: Peaks,
    frozen: bool = False,
    path: Path | None = None,
) -> dict[str, Any]:
    """The table of one forward and backward, as `summary` gives it; the trace stays at `path`.

    case: whose kernels of this op are known by name; None where it has no part in the call.
    """
    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] if device.type == "cuda" else []
    run()
    synchronize(device)
    with profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(CALLS):
            if device.type == "cuda":  # a profiled launch takes the host longer than a plain one
                torch.cuda._sleep(10 * LEAD_CYCLES)
            with record_function(RANGE):
                run()
            synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = path or Path(folder, "trace.json.gz")
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
        with gzip.open(path, "rt") as file:
            return summary(json.load(file)["traceEvents"], case, peaks, CALLS, frozen)


def summary(
    events: Iterable[dict[str, Any]],
    case: Case | None,
    peaks: Peaks,
    calls: int,
    frozen: bool = False,
) -> dict[str, Any]:
    """Of a trace of `calls` calls, per call: kernels, longest first, and the time between them.

    Each kernel: name, launches, us, its share of all kernels' time, gb_per_s or tflops, and roof:
    the least time its work could take over the time it took. The last three are None where its
    work is not known (on a CPU: but for matrix products) or, roof, where it fits in the L2 cache.
    """
    whole = [event for event in events if event.get("ph") == "X"]
    launches, gap_us, gaps = _on_gpu(whole)
    if not launches:
        launches, gap_us, gaps = _on_cpu(whole)
    busy = sum(launch.us for launch in launches)
    own = _own_kernels(case, frozen) if case else {}
    groups: dict[str, list[Launch]] = {}
    for launch in launches:
        groups.setdefault(launch.name, []).append(launch)
    kernels = [
        {
            "name": name,
            "launches": len(group) / calls,
            "us": sum(launch.us for launch in group) / calls,
            "share": sum(launch.us for launch in group) / busy,
            **_rates(group, own, peaks),
        }
        for name, group in groups.items()
    ]
    return {
        "kernels": sorted(kernels, key=lambda kernel: -kernel["us"]),
        "busy_us": busy / calls,
        "gap_us": gap_us / calls,
        "gaps": gaps / calls,
    }


def _on_gpu(events: list[dict[str, Any]]) -> tuple[list[Launch], float, int]:
    """What ran on the GPU, and the idle time between launches of a call, in how many gaps."""

    def number(event: dict[str, Any]) -> Any:
        return event.get("args", {}).get("External id")

    ops = {number(e): e for e in events if e.get("cat") == "cpu_op" and number(e)}
    found = [
        Launch(e["name"], e["ts"], e["dur"], ops.get(number(e), {}), True)
        for e in sorted(events, key=lambda event: event["ts"])
        if e.get("cat") in ON_GPU
    ]
    gap_us, gaps, free = 0.0, 0, math.inf
    for launch in found:
        idle = IDLE in launch.name  # before a call: what precedes it is no gap of the call
        if launch.start > free and not idle:
            gap_us, gaps = gap_us + launch.start - free, gaps + 1
        end = launch.start + launch.us
        free = end if idle or free == math.inf else max(free, end)
    return [launch for launch in found if IDLE not in launch.name], gap_us, gaps


def _on_cpu(events: list[dict[str, Any]]) -> tuple[list[Launch], float, int]:
    """Ops with the time spent in themselves; the gap is what is left of the calls' ranges."""
    found: list[Launch] = []
    open_ops: list[tuple[Launch, float, int]] = []  # and its end, and thread
    ranges = [(e["ts"], e["ts"] + e["dur"]) for e in events if e["name"] == RANGE]
    ops = [e for e in events if e.get("cat") == "cpu_op"]
    for e in sorted(ops, key=lambda event: (event["tid"], event["ts"], -event["dur"])):
        if not any(start <= e["ts"] <= end for start, end in ranges):
            continue
        launch = Launch(e["name"], e["ts"], e["dur"], e, False)
        while open_ops and (open_ops[-1][1] <= e["ts"] or open_ops[-1][2] != e["tid"]):
            open_ops.pop()
        if open_ops:
            open_ops[-1][0].us -= e["dur"]
        open_ops.append((launch, e["ts"] + e["dur"], e["tid"]))
        found.append(launch)
    span = sum(end - start for start, end in ranges)
    return found, max(0.0, span - sum(launch.us for launch in found)), 0


Work = tuple[float, float]  # bytes moved, FLOPs


def _own_kernels(case: Case, frozen: bool) -> dict[str, Work]:
    """What this op's kernels do in one launch, by their names."""
    found = {}
    for way in ("recompute", "cublas"):
        for step in steps(case, way, "both", frozen):
            found[step.name] = (step.bytes, step.flops)
    named = {f"{name}_kernel": work for name, work in found.items() if not work[1]}
    (a, b, ds) = (found[name] for name in ("a", "b", "ds"))
    return named | {"_dual_gemm": (a[0] + b[0], a[1] + b[1]), "_gate_gemm": ds}


def _rates(group: list[Launch], own: dict[str, Work], peaks: Peaks) -> dict[str, float | None]:
    work = [_work(launch, own) for launch in group]
    seconds = sum(launch.us for launch in group) / 1e6
    if any(each is None for each in work) or seconds <= 0:
        return {"gb_per_s": None, "tflops": None, "roof": None}
    moved, flops = (sum(each[i] for each in work if each) for i in range(2))
    known = flops or min(each[0] for each in work if each) > peaks.l2
    least = max(flops / peaks.flops, moved / peaks.bandwidth)
    return {
        "gb_per_s": None if flops else moved / seconds / 1e9,
        "tflops": flops / seconds / 1e12 if flops else None,
        "roof": least / seconds if known else None,
    }


def _work(launch: Launch, own: dict[str, Work]) -> Work | None:
    """Of this op's kernels as calculated, of others by the inputs of the op."""
    if launch.name in own:
        return own[launch.name]
    args = launch.op.get("args", {})
    tensors = [
        (shape, SIZES[kind])
        for shape, kind in zip(args.get("Input Dims", ()), args.get("Input type", ()), strict=False)
        if kind in SIZES and shape and not isinstance(shape[0], list)
    ]
    name, sizes = launch.op.get("name", ""), [math.prod(shape) * size for shape, size in tensors]
    if name.rstrip("_") in ("aten::mm", "aten::addmm"):
        (m, k), (_, n) = (shape for shape, _ in tensors[-2:])
        return sum(sizes[-2:]) + m * n * tensors[-1][1], 2.0 * m * n * k
    if (
        not sizes or name.startswith("tokenflex") or not launch.on_gpu
    ):  # many ops of a CPU are views
        return None
    smaller = any(part in name for part in REDUCING)
    return sum(sizes) + (0 if smaller else max(sizes)), 0.0
