"""The commands with which NVIDIA's profilers look at what is profiled here."""

import shlex
from collections.abc import Sequence

from kernels.profile.bench import BenchSettings
from kernels.profile.cases import Case

# This op's Triton kernels in one forward and backward, a launch each; column sums are left out.
LAUNCHES = {
    "save": ("pool_norm", "swiglu", "swiglu_backward", "norm_backward", "pool_backward"),
    "recompute": (
        "pool_norm",
        "swiglu",
        "norm",
        "swiglu_backward",
        "norm_backward",
        "pool_backward",
    ),
    "fused": ("pool_norm", "_dual_gemm", "_gate_gemm", "norm_backward", "pool_backward"),
}


def _target(case: Case, name: str, settings: BenchSettings) -> str:
    frozen = ["--frozen-vit"] if settings.frozen else []
    options = [f"--shape={case.name}", f"--provider={name}", *frozen, "--once"]
    return shlex.join(["python", "-m", "kernels.profile", *options])


def ncu_commands(cases: Sequence[Case], settings: BenchSettings) -> list[str]:
    """Nsight Compute on one call: this op's kernels alone, or all of a provider's.

    `--once` starts the profiler after two calls, so that no launch is to be skipped. Clocks are
    held at the base: times compare between kernels and runs, but are longer than in the tables.
    """
    return [_ncu(cases[0], name, settings) for name in settings.providers]


def _ncu(case: Case, name: str, settings: BenchSettings) -> str:
    skipped = "pool_backward" if settings.frozen else ""
    launches = [kernel for kernel in LAUNCHES.get(name, ()) if kernel != skipped]
    names = "|".join(n if n.startswith("_") else f"{n}_kernel" for n in launches)
    only = f"--kernel-name 'regex:^({names})$' --launch-count {len(launches)} " if names else ""
    return (
        "ncu --set full --import-source yes --clock-control base --profile-from-start off --nvtx "
        f"--launch-skip 0 {only}--force-overwrite --export ncu-{name} "
        + _target(case, name, settings)
    )


def nsys_commands(cases: Sequence[Case], settings: BenchSettings) -> list[str]:
    """Nsight Systems on one call of each provider: the host's calls beside the GPU's kernels."""
    return [
        "nsys profile --trace=cuda,nvtx,cublas,osrt --capture-range=cudaProfilerApi "
        f"--capture-range-end=stop --force-overwrite=true --output=nsys-{name} "
        + _target(cases[0], name, settings)
        for name in settings.providers
    ]
