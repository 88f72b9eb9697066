"""A Chrome trace (chrome://tracing, ui.perfetto.dev) of every provider on one case."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from kernels.profile.bench import CaseResult
from kernels.profile.providers import PROVIDERS
from kernels.profile.random_inputs import backward, make_inputs
from kernels.profile.timing import synchronize

TRACE = "trace.json"
CALLS = 2


def write_trace(result: CaseResult, device: torch.device, folder: Path) -> None:
    """Write folder/trace.json: forward and backward of each provider measured, twice."""
    case = result.case
    inputs = make_inputs(case, device, frozen=result.frozen)
    activities = [ProfilerActivity.CPU]
    calls = {name: PROVIDERS[name].build(case, device) for name in result.measured}
    for call in calls.values():
        backward(inputs, call(inputs.x, inputs.weights))
    synchronize(device)
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        for name, call in calls.items():
            for _ in range(CALLS):
                with record_function(f"{name}: forward"):
                    out = call(inputs.x, inputs.weights)
                with record_function(f"{name}: backward"):
                    backward(inputs, out)
                del out
            synchronize(device)
    profiler.export_chrome_trace(str(folder / TRACE))
