"""Without a GPU: the calculated floors, and the compile report."""

from collections.abc import Iterable, Sequence
from typing import Any

from kernels.aligned_text import aligned
from kernels.dispatch import interpreting
from kernels.profile.cases import Case
from kernels.profile.roofline import MODES, WAYS, Peaks, floor_s, model_flops, saved_bytes

# Both measured on an H200: an 8192^3 bf16 matrix product, a copy counted read plus written.
ASSUMED = Peaks(flops=790e12, bandwidth=4.3e12)


def report(
    cases: Sequence[Case], peaks: Peaks, frozen: bool, compile_report: bool
) -> tuple[dict[str, Any], bool]:
    """Print all that can be known without a GPU.

    Returns the same for a file, and whether every kernel compiles.
    """
    compiles = True
    print("No GPU was found: nothing was timed. The figures below are calculated.\n")
    print(
        f"The least time at an assumed {peaks.flops / 1e12:g} TFLOP/s and "
        f"{peaks.bandwidth / 1e12:g} TB/s (set them with --peak-tflops and --bandwidth).\n"
        "Columns with slashes: eager / compile / cublas, this op as it ships / fused, its fused\n"
        "matrix products if they were as fast as cuBLAS / recompute (backward only). Ratios:\n"
        "forward and backward together. Kept for backward: eager / compile / save / recompute.\n"
    )
    rows = [_row(case, peaks, frozen) for case in cases]
    print(f"{_table(rows)}\n")
    if compile_report:
        compiles = _print_compile_report()
    else:
        print("Compile report left out (--no-compile-report).")
    print("\nNothing was timed: no GPU was found.")
    content = {
        "kind": "calculated: nothing was timed, no GPU was found",
        "assumed": {"tflops": peaks.flops / 1e12, "tb_per_s": peaks.bandwidth / 1e12},
        "cases": rows,
    }
    return content, compiles


def _row(case: Case, peaks: Peaks, frozen: bool) -> dict[str, Any]:
    """Floors in microseconds and bytes kept for backward."""
    return {
        "kind": "calculated",
        "case": case.name,
        "tokens": case.rows,
        "gflop_forward": model_flops(case, "forward") / 1e9,
        "frozen_vit": frozen,
        **{
            f"floor_us_{mode}_{way}": 1e6 * floor_s(case, way, mode, peaks, frozen)
            for mode in MODES
            for way in WAYS
        },
        **{f"saved_bytes_{way}": saved_bytes(case, way, frozen) for way in WAYS},
    }


def _table(rows: Sequence[dict[str, Any]]) -> str:
    """Every way, and how they compare."""
    header = [
        "calculated",
        *("tokens", "GFLOP fwd"),
        *("forward us", "backward us", "cublas over eager", "over compile"),
        *("fused over eager", "over compile"),
        *("kept for backward MB", "of eager"),
    ]
    lines = []
    for row in rows:
        forward, backward, both = (
            [row[f"floor_us_{mode}_{way}"] for way in WAYS] for mode in MODES
        )
        eager, compiled, cublas, fused, _ = both
        kept = [row[f"saved_bytes_{way}"] for way in ("eager", "compile", "cublas", "recompute")]
        lines.append(
            [
                row["case"],
                str(row["tokens"]),
                f"{row['gflop_forward']:.0f}",
                _slashed(forward[:4]),
                _slashed(backward),
                *(f"{b / a:.2f}x" for a in (cublas, fused) for b in (eager, compiled)),
                _slashed(value / 1e6 for value in kept),
                f"{kept[2] / kept[0]:.0%} / {kept[3] / kept[0]:.0%}",
            ]
        )
    return aligned([header, *lines])


def _slashed(values: Iterable[float]) -> str:
    return " / ".join(f"{value:.0f}" for value in values)


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
