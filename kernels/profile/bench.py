"""Measuring one case: every provider on the same inputs, one after another, one of them twice."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.profile.accuracy import float64_results, relative_errors
from kernels.profile.baselines import Call
from kernels.profile.cases import Case
from kernels.profile.kernel_table import traced
from kernels.profile.memory import measure_memory
from kernels.profile.providers import PROVIDERS
from kernels.profile.random_inputs import Inputs, backward, outputs_and_gradients, rotating_inputs
from kernels.profile.roofline import Peaks
from kernels.profile.system import watched
from kernels.profile.timing import phases, synchronize, time_call

REPEATED = "save"  # the provider that is timed twice, where it is among those asked for
PER_CALL_S, PER_CASE_S = 0.5, 6.0  # of a float64 check, memory and a trace; of random inputs


class DeviceLostError(RuntimeError):
    """The GPU no longer answers, as after an access outside memory: nothing more can run."""


@dataclass(frozen=True)
class BenchSettings:
    """What is measured. frozen: x needs no gradient, as where the vision tower is not trained.

    sustained: without rests between calls. traces: the folder for the Chrome trace of the provider
    timed twice; without one no table of kernels is made.
    """

    providers: tuple[str, ...]
    modes: tuple[str, ...]
    min_ms: float = 100.0
    frozen: bool = False
    sustained: bool = False
    traces: Path | None = None

    def record(self) -> dict[str, Any]:
        """What two runs must share to be one, for the file."""
        return asdict(self) | {"traces": self.traces is not None}


def expected_s(cases: Sequence[Case], settings: BenchSettings, device: torch.device) -> float:
    """About how many seconds measuring takes, on a GPU; the rests take longer than the calls."""
    mode_s = (3 if settings.sustained else 5) * settings.min_ms / 1e3 + 0.1
    per_call = PER_CALL_S + len(settings.modes) * mode_s
    fit = [
        PROVIDERS[p] for c in cases for p in settings.providers if not PROVIDERS[p].unfit(c, device)
    ]
    return len(cases) * (PER_CASE_S + per_call) + sum(p.build_s + per_call for p in fit)


def measure_case(
    case: Case,
    settings: BenchSettings,
    device: torch.device,
    peaks: Peaks,
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Errors and memory of every provider, then its times; a provider that fails is noted.

    Returns the record of one case as the file keeps it: `providers` has errors by name of the
    tensor, `memory` in bytes, `timings` by mode and `kernels`; `noise` by mode is the second median
    of `repeated`, timed first and last, over its first. Raises DeviceLostError where the GPU does
    not survive a failure.
    """
    record = new_record(case.name, asdict(case), peaks, settings.frozen)
    sets = rotating_inputs(case, device, settings.frozen)
    calls = _build(case, settings.providers, device, record)
    progress("float64")
    expected = float64_results(case, sets[0])
    return measure_calls(record, calls, sets, expected, settings, device, case, progress)


def new_record(
    name: str, shape: dict[str, Any], peaks: Peaks, frozen: bool = False
) -> dict[str, Any]:
    """The record of a case of which nothing is measured yet."""
    return {
        **{"case": name, "shape": shape, "peaks": asdict(peaks), "frozen": frozen},
        **{"providers": {}, "noise": {}, "skipped": {}, "failed": {}},
    }


def measure_calls(
    record: dict[str, Any],
    calls: dict[str, Call],
    sets: Sequence[Inputs],
    expected: dict[str, Tensor],
    settings: BenchSettings,
    device: torch.device,
    case: Case | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """`measure_case` for any calls on the same inputs: fills and returns `record`.

    calls: by name of the provider. expected: as `outputs_and_gradients`, which errors are taken of.
    case: the projector's, whose kernels are then known by name; None for anything else.
    """
    peaks = Peaks(**record["peaks"])
    for name, call in calls.items():
        progress(name)
        with noting_failure(record, name, device):
            errors = relative_errors(outputs_and_gradients(call, sets[0]), expected)
            for inputs in sets[1:]:  # a CUDA graph is captured for each
                call(inputs.x, inputs.weights)
            memory = asdict(measure_memory(call, sets[0], device))
            record["providers"][name] = {"errors": errors, "memory": memory, "timings": {}}
    del expected
    # The one that is timed again last comes first, so that its two times span all others.
    names = sorted(record["providers"], key=lambda name: name != REPEATED)
    with watched(device) as gpu:
        for name in names:
            progress(name)
            with noting_failure(record, name, device):
                timings = _time_modes(name, calls[name], sets, settings, device)
                record["providers"][name]["timings"] = timings
        _repeat_one(record, calls, sets, settings, device)
    record["gpu"] = gpu
    if settings.traces:
        for name in names:
            progress(f"trace of {name}")
            with noting_failure(record, name, device):
                run = _both(calls[name], sets[0])
                path = settings.traces / f"{record['case'].replace('/', '_')}-{name}.json.gz"
                kept = path if name == names[0] else None
                table = traced(run, case, device, peaks, settings.frozen, kept)
                record["providers"][name]["kernels"] = table
    del calls, sets
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return record


def _build(
    case: Case, names: Sequence[str], device: torch.device, record: dict[str, Any]
) -> dict[str, Call]:
    calls = {}
    for name in names:
        if reason := PROVIDERS[name].unfit(case, device):
            record["skipped"][name] = reason
            continue
        with noting_failure(record, name, device):
            calls[name] = PROVIDERS[name].build(case, device)
    return calls


def _both(call: Call, inputs: Inputs) -> Callable[[], object]:
    return lambda: backward(inputs, call(inputs.x, inputs.weights))


def run_once(case: Case, settings: BenchSettings, device: torch.device) -> None:
    """Every provider once after two calls to warm up, for what waits for cudaProfilerStart."""
    inputs = rotating_inputs(case, device, settings.frozen)[0]
    for name in settings.providers:
        if PROVIDERS[name].unfit(case, device):
            continue
        run = _both(PROVIDERS[name].build(case, device), inputs)
        for _ in range(2):
            run()
        synchronize(device)
        with ExitStack() as stack:
            if device.type == "cuda":
                stack.enter_context(torch.cuda.profiler.profile())
            stack.enter_context(nvtx_range(name, device))
            run()
            synchronize(device)


@contextmanager
def nvtx_range(name: str, device: torch.device) -> Iterator[None]:
    """A named range in what Nsight records; nothing on a CPU."""
    if device.type == "cuda":
        with torch.cuda.nvtx.range(name):
            yield
    else:
        yield


def _time_modes(
    name: str, call: Call, sets: Sequence[Inputs], settings: BenchSettings, device: torch.device
) -> dict[str, Any]:
    timings = {}
    for mode in settings.modes:
        with nvtx_range(f"{name}: {mode}", device):
            parts = phases(call, sets, mode)
            timing = time_call(*parts, device, settings.min_ms, rest=not settings.sustained)
        timings[mode] = asdict(timing)
    return timings


def _repeat_one(
    record: dict[str, Any],
    calls: dict[str, Call],
    sets: Sequence[Inputs],
    settings: BenchSettings,
    device: torch.device,
) -> None:
    """Time one provider again after all others: how far two equal measurements differ."""
    timed = [name for name, found in record["providers"].items() if found["timings"]]
    if not timed:
        return
    name = record["repeated"] = REPEATED if REPEATED in timed else timed[0]
    with noting_failure(record, name, device):
        again = _time_modes(name, calls[name], sets, settings, device)
        first = record["providers"][name]["timings"]
        record["noise"] = {m: again[m]["median_ms"] / first[m]["median_ms"] for m in again}


@contextmanager
def noting_failure(record: dict[str, Any], name: str, device: torch.device) -> Iterator[None]:
    """Turns an exception of one provider into a note, and checks that the GPU still answers."""
    try:
        yield
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no message"]
        record["failed"][name] = f"{type(error).__name__}: {lines[0]}"
        error.__traceback__ = None  # its frames hold tensors
        try:
            synchronize(device)
            if device.type == "cuda":
                torch.cuda.empty_cache()
        except RuntimeError as lost:
            raise DeviceLostError(f"{name} on {record['case']}: {lines[0]}") from lost
