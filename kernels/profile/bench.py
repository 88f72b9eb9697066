"""Measuring one case: every provider on the same inputs, one after another, one of them twice."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module

import torch
from torch import Tensor

from kernels.dispatch import implementation
from kernels.passes import Pooling
from kernels.profile.accuracy import float64_results, relative_errors
from kernels.profile.cases import Case
from kernels.profile.memory import Memory, measure_memory
from kernels.profile.providers import EPS, PROVIDERS, Call
from kernels.profile.random_inputs import Inputs, outputs_and_gradients, rotating_inputs
from kernels.profile.roofline import Peaks
from kernels.profile.timing import Timing, phases, synchronize, time_call
from kernels.tile_layout import tile_layout

REPEATED = "save"  # the provider that is timed twice, where it is among those asked for


class DeviceLostError(RuntimeError):
    """The GPU no longer answers, as after an access outside memory: nothing more can run."""


@dataclass(frozen=True)
class BenchSettings:
    """What is measured. frozen: x needs no gradient, as where the vision tower is not trained."""

    providers: tuple[str, ...]
    modes: tuple[str, ...]
    min_ms: float = 200.0
    frozen: bool = False


@dataclass
class Measured:
    """One provider on one case: timings by mode; errors of the result and gradients by name."""

    errors: dict[str, float]
    memory: Memory
    timings: dict[str, Timing] = field(default_factory=dict)


@dataclass
class CaseResult:
    """All that was measured on one case.

    repeated: the provider timed first and last; noise: by mode, its second median over its first.
    skipped, failed: provider -> why. pool_norm: the kernel of pooling and LayerNorm alone.
    """

    case: Case
    peaks: Peaks
    frozen: bool
    input_sets: int = 0
    measured: dict[str, Measured] = field(default_factory=dict)
    repeated: str = ""
    noise: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    pool_norm: Timing | None = None


def measure_case(
    case: Case,
    settings: BenchSettings,
    device: torch.device,
    peaks: Peaks,
    progress: Callable[[str], None] = lambda what: None,
) -> CaseResult:
    """Errors and memory of every provider, then its times; a provider that fails is noted.

    Raises DeviceLostError where the GPU does not survive a failure.
    """
    result = CaseResult(case, peaks, settings.frozen)
    sets = rotating_inputs(case, device, settings.frozen)
    result.input_sets = len(sets)
    calls = _build(case, settings.providers, device, result)
    progress("float64")
    expected = float64_results(case, sets[0])
    for name, call in calls.items():
        progress(name)
        with _noting_failure(result, name, device):
            errors = relative_errors(outputs_and_gradients(call, sets[0]), expected)
            result.measured[name] = Measured(errors, measure_memory(call, sets[0], device))
    del expected
    # The one that is timed again last comes first, so that its two times span all others.
    for name in sorted(result.measured, key=lambda name: name != REPEATED):
        progress(name)
        found = result.measured[name]
        with _noting_failure(result, name, device):
            found.timings = _time_modes(calls[name], sets, settings, device)
    _repeat_one(result, calls, sets, settings, device)
    progress("pool + norm")
    with _noting_failure(result, "pool_norm", device):
        result.pool_norm = _time_pool_norm(case, sets, settings, device)
    del calls, sets
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return result


def _build(
    case: Case, names: Sequence[str], device: torch.device, result: CaseResult
) -> dict[str, Call]:
    calls = {}
    for name in names:
        provider = PROVIDERS[name]
        if reason := provider.unfit(case, device):
            result.skipped[name] = reason
            continue
        with _noting_failure(result, name, device):
            calls[name] = provider.build(case, device)
    return calls


def _time_modes(
    call: Call, sets: Sequence[Inputs], settings: BenchSettings, device: torch.device
) -> dict[str, Timing]:
    return {
        mode: time_call(*phases(call, sets, mode), device, settings.min_ms)
        for mode in settings.modes
    }


def _repeat_one(
    result: CaseResult,
    calls: dict[str, Call],
    sets: Sequence[Inputs],
    settings: BenchSettings,
    device: torch.device,
) -> None:
    """Time one provider again after all others: how far two equal measurements differ."""
    timed = [name for name, found in result.measured.items() if found.timings]
    if not timed:
        return
    name = REPEATED if REPEATED in timed else timed[0]
    result.repeated = name
    with _noting_failure(result, name, device):
        again = _time_modes(calls[name], sets, settings, device)
        first = result.measured[name].timings
        result.noise = {mode: again[mode].median_ms / first[mode].median_ms for mode in again}


def _time_pool_norm(
    case: Case, sets: Sequence[Inputs], settings: BenchSettings, device: torch.device
) -> Timing:
    runs = implementation("auto", device, case.torch_dtype)
    pool_norm = import_module(f"kernels.{runs}_impl").pool_norm
    pooling = Pooling(tile_layout(case.sides, device), case.grid, case.pool)

    @torch.no_grad()
    def run(inputs: Inputs) -> Tensor:
        weights = inputs.weights
        return pool_norm(inputs.x, pooling, weights.norm_weight, weights.norm_bias, EPS)

    return time_call(lambda i: sets[i % len(sets)], run, device, settings.min_ms)


@contextmanager
def _noting_failure(result: CaseResult, name: str, device: torch.device) -> Iterator[None]:
    """Turns an exception of one provider into a note, and checks that the GPU still answers."""
    try:
        yield
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no message"]
        result.failed[name] = f"{type(error).__name__}: {lines[0]}"
        error.__traceback__ = None  # its frames hold tensors
        try:
            synchronize(device)
            if device.type == "cuda":
                torch.cuda.empty_cache()
        except RuntimeError as lost:
            raise DeviceLostError(f"{name} on {result.case.name}: {lines[0]}") from lost
