"""Without a GPU: the calculated floors, memory counted on the CPU, and the compile report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kernels.aligned_text import aligned
from kernels.dispatch import interpreting
from kernels.profile.cases import Case
from kernels.profile.memory import saved_for_backward
from kernels.profile.providers import PROVIDERS
from kernels.profile.random_inputs import make_inputs
from kernels.profile.results import write_csv, write_json
from kernels.profile.roofline import Peaks
from kernels.profile.text_report import calculated_rows, format_calculated

# Both measured on an H200: an 8192^3 bf16 matrix product, a copy counted read plus written.
ASSUMED = Peaks(flops=790e12, bandwidth=4.3e12)
COUNTED = ("eager_grouped", "save", "recompute")
# Small enough for seconds on a CPU; in the widths' usual proportions, so that shares are the same.
COUNTED_CASE = Case((8, 12, 16), (0.2, 0.3, 0.5), tiles=10, channels=288, hidden=864, width=512)


def report(cases: Sequence[Case], peaks: Peaks, frozen: bool, compile_report: bool) -> bool:
    """Print all that can be known without a GPU; False where a kernel does not compile."""
    compiles = True
    print("No GPU was found: nothing was timed. The figures below are calculated.\n")
    print(
        f"The least time at an assumed {peaks.flops / 1e12:g} TFLOP/s and "
        f"{peaks.bandwidth / 1e12:g} TB/s (set them with --peak-tflops and --bandwidth).\n"
        "Columns with slashes: eager / compile / cublas, this op as it ships / fused, its fused\n"
        "matrix products if they were as fast as cuBLAS / recompute (backward only). Ratios:\n"
        "forward and backward together. Kept for backward: eager / compile / save / recompute.\n"
    )
    print(format_calculated(cases, peaks, frozen))
    print(f"\n{count_saved(frozen)}\n")
    if compile_report:
        compiles = _print_compile_report()
    else:
        print("Compile report left out (--no-compile-report).")
    print("\nNothing was timed: no GPU was found.")
    return compiles


def count_saved(frozen: bool) -> str:
    """A table of what autograd's hooks see saved on a CPU, at reduced widths."""
    case, device = COUNTED_CASE, torch.device("cpu")
    inputs = make_inputs(case, device, frozen=frozen)
    counts = {
        name: sum(saved_for_backward(PROVIDERS[name].build(case, device), inputs))
        for name in COUNTED
    }
    eager = counts["eager_grouped"]
    rows = [[name, f"{n / 1e6:.2f}", f"{n / eager:.1%}"] for name, n in counts.items()]
    title = f"Kept for backward, counted by autograd's hooks on the CPU at {case.name}"
    return f"{title}:\n{aligned([['', 'MB', 'of eager'], *rows])}"


def _print_compile_report() -> bool:
    """Registers, spills and shared memory of every kernel; False where one does not compile."""
    try:
        from kernels.compile_report import compile_all, format_summary
    except ImportError as error:
        print(f"No compile report: {error}; install triton, or pass --no-compile-report")
        return True
    if interpreting():
        print("No compile report: TRITON_INTERPRET is set; unset it to compile the kernels")
        return True
    print("Compiling every kernel for every architecture ...", flush=True)
    try:
        results = compile_all()
        print(format_summary(results))
    except Exception as error:  # Triton, its assembler or a worker: whatever ends it, say so
        print(f"COMPILE REPORT FAILED: {type(error).__name__}: {error}")
        return False
    over = sum(bool(result.problems()) for result in results)
    print(
        f"{len(results)} configurations compiled, {over} of them beyond a limit; "
        "python -m kernels.compile_report lists each"
    )
    return True


def write_files(
    cases: Sequence[Case], peaks: Peaks, frozen: bool, machine: dict[str, Any], out: Path
) -> list[Path]:
    """JSON, CSV and PNG of the calculated floors, each saying that it is calculated."""
    from kernels.profile.plots import plot_calculated

    rows = [{"kind": "calculated"} | row for row in calculated_rows(cases, peaks, frozen)]
    paths = [out / f"calculated.{suffix}" for suffix in ("json", "csv", "png")]
    content = {
        "kind": "calculated: nothing was timed, no GPU was found",
        "assumed": {"tflops": peaks.flops / 1e12, "tb_per_s": peaks.bandwidth / 1e12},
        "machine": machine,
        "cases": rows,
    }
    write_json(paths[0], content)
    write_csv(paths[1], rows)
    plot_calculated(cases, peaks, frozen, paths[2])
    return paths
