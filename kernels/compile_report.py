"""Compile every shipped launch configuration ahead of time, and report what each one uses.

    python -m kernels.compile_report [--arch 90] [--kernel dual_gemm] [--json FILE]

Needs no GPU, and times nothing but the compiler. Each step of the op is called on uninitialised CPU
tensors of the flagship's shape with Triton's launch replaced by a recorder; what the launch would
have compiled is compiled here, from the same constants and specialisations.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from kernels.aligned_text import aligned
from kernels.compile_specs import ARCHITECTURES, SPECS, Job, Launch, describe, jobs, launches

# Dynamic shared memory a program may have. sm_80 itself has 166912 bytes, but its entries serve
# unknown architectures too, and of those sm_86, sm_89 and sm_120 have this much.
SHARED_LIMITS = {80: 101376, 90: 232448, 100: 232448}
HEAD = ("kernel", "dtype", "sm", "regs", "stack", "spills", "shared", "access", "s")
COLUMNS = (*HEAD, "matrix", "config")
FULL_ACCESS = 16  # bytes a thread loads or stores at once where addresses and masks allow it
MATRIX_INSTRUCTIONS = {
    "mma": r"\bmma\.sync\.",
    "wgmma": r"\bwgmma\.mma_async\.",
    "tcgen05": r"\btcgen05\.mma\.",
}


@dataclass(frozen=True)
class CompileResult:
    """What one launch configuration compiles to. Stack and spills should be 0.

    config: what distinguishes it: rows from which it is taken, channels, constants, warps, stages.
    spill_loads, spill_stores: instructions. shared_bytes: dynamic shared memory per program.
    access_bytes: the widest load or store of global memory; less than 16 where nothing vectorised.
    matrix_instructions: kind and number. varying: arguments for which another number of rows or
    tiles compiles the kernel again. seconds: compile time, less when cached.
    """

    kernel: str
    dtype: str
    arch: int
    config: str
    registers: int
    stack_bytes: int
    spill_loads: int
    spill_stores: int
    shared_bytes: int
    access_bytes: int
    matrix_instructions: str
    varying: str
    seconds: float

    def problems(self) -> list[str]:
        """What is beyond a limit; empty for a sound configuration."""
        limit = SHARED_LIMITS.get(self.arch, min(SHARED_LIMITS.values()))
        found = []
        if self.stack_bytes or self.spill_loads or self.spill_stores:
            found.append(f"{self.spill_loads + self.spill_stores} spills, stack {self.stack_bytes}")
        if self.shared_bytes > limit:
            found.append(f"{self.shared_bytes} bytes of shared memory, of {limit}")
        if self.access_bytes < FULL_ACCESS:
            found.append(f"no access of global memory is wider than {self.access_bytes} bytes")
        if self.varying:
            found.append(f"compiled again for another batch, because of {self.varying}")
        return found


def compile_all(
    archs: Iterable[int] = ARCHITECTURES, kernels: Iterable[str] = tuple(SPECS), processes: int = 0
) -> list[CompileResult]:
    """Compile the shipped entries, in as many processes as there are cores unless told otherwise.

    Raises RuntimeError in a process in which Triton interprets kernels, and Triton's own errors for
    what does not compile.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError(
            "TRITON_INTERPRET is set: kernels are interpreted in this process and cannot be "
            "compiled; unset it and start another process"
        )
    wanted = jobs(archs, kernels)
    with ProcessPoolExecutor(
        processes or os.cpu_count(), mp_context=get_context("spawn")
    ) as executor:
        return [result for found in executor.map(_compile_job, wanted) for result in found]


def _compile_job(job: Job) -> list[CompileResult]:
    """Each launch of the job's kernel, compiled once."""
    results = []
    # As many rows as change whether 16 divides them and their tiles, which Triton specialises on.
    for at, other in zip(launches(job), launches(job, more_rows=15), strict=True):
        started = time.perf_counter()
        compiled = _compile(at, job.arch)
        seconds = time.perf_counter() - started
        results.append(
            CompileResult(
                job.name,
                job.dtype,
                job.arch,
                describe(job, at[2]),
                **_resource_usage(compiled),
                shared_bytes=compiled.metadata.shared,
                varying=_varying(at, other, job.arch),
                seconds=round(seconds, 2),
            )
        )
    return results


def _bind(made: Launch, arch: int) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
    """As in `JITFunction.run`: backend, arguments, specialisations, what is left, options."""
    kernel, args, options = made
    backend = make_backend(GPUTarget("cuda", arch, 32))
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    options = {**options, "debug": False}
    return backend, *binder(*args, **options), options


def _compile(made: Launch, arch: int) -> Any:
    """As the launch would compile, for an architecture that need not be present."""
    backend, bound, specialization, rest, options = _bind(made, arch)
    parsed, signature, constants, attributes = made[0]._pack_args(
        backend, options, bound, specialization, rest
    )
    source = ASTSource(made[0], signature, constants, attributes)
    return triton.compile(source, target=backend.target, options=parsed.__dict__)


def _varying(made: Launch, other: Launch, arch: int) -> str:
    """The arguments that Triton specialises on differently in two launches of a kernel."""
    pairs = zip(_bind(made, arch)[2], _bind(other, arch)[2], strict=True)
    return " ".join(
        parameter.name
        for parameter, (first, second) in zip(made[0].params, pairs, strict=True)
        if first != second
    )


def _resource_usage(compiled: Any) -> dict[str, Any]:
    """Registers, stack and spills of the machine code; accesses and matrix instructions of the PTX.

    Disassembling takes longer than compiling a small kernel, and what spills needs a stack: so only
    code that has one is disassembled.
    """
    usage = _cuobjdump("-res-usage", compiled.asm["cubin"])
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage printed no resource usage:\n{usage[:2000]}")
    registers, stack = int(found[1]), int(found[2])
    sass = _cuobjdump("-sass", compiled.asm["cubin"]) if stack else ""
    ptx = compiled.asm["ptx"]
    accesses = re.findall(r"\b(?:ld|st)\.global(?:\.\w+)*?(?:\.v(\d))?\.[bfsu](\d+)\b", ptx)
    matrix = {name: len(re.findall(pattern, ptx)) for name, pattern in MATRIX_INSTRUCTIONS.items()}
    return {
        "registers": registers,
        "stack_bytes": stack,
        "spill_loads": len(re.findall(r"\bLDL\b", sass)),
        "spill_stores": len(re.findall(r"\bSTL\b", sass)),
        "access_bytes": max(int(lanes or 1) * int(bits) // 8 for lanes, bits in accesses),
        "matrix_instructions": " ".join(f"{name} x{n}" for name, n in matrix.items() if n),
    }


def _cuobjdump(option: str, cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, option, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def format_report(results: list[CompileResult]) -> str:
    """The results as a table, one line each, with what is beyond a limit at the end of its line."""
    lines = [list(COLUMNS)]
    for r in results:
        spills = r.spill_loads + r.spill_stores
        numbers = (r.registers, r.stack_bytes, spills, r.shared_bytes, r.access_bytes, r.seconds)
        config = "; ".join([r.config, *(f"OVER THE LIMIT: {p}" for p in r.problems())])
        lines.append(
            [r.kernel, r.dtype, str(r.arch), *map(str, numbers), r.matrix_instructions, config]
        )
    return aligned(lines, left=range(len(lines[0])))


def format_summary(results: list[CompileResult]) -> str:
    """One line per kernel and architecture: the most that any of its configurations uses."""
    lines = [["kernel", "sm", "configurations", "registers", "stack", "spills", "shared", "matrix"]]
    groups: dict[tuple[str, int], list[CompileResult]] = {}
    for result in results:
        groups.setdefault((result.kernel, result.arch), []).append(result)
    for (kernel, arch), group in groups.items():
        spills = max(r.spill_loads + r.spill_stores for r in group)
        most = (max(r.registers for r in group), max(r.stack_bytes for r in group), spills)
        kinds = sorted({r.matrix_instructions.split()[0] for r in group if r.matrix_instructions})
        shared = max(r.shared_bytes for r in group)
        numbers = (arch, len(group), *most, shared)
        lines.append([kernel, *map(str, numbers), " ".join(kinds)])
        lines += [[f"  beyond a limit: {p} ({r.config})"] for r in group for p in r.problems()]
    return aligned(lines, left=range(len(lines[0])))


def main() -> None:
    """Print the report; exit with 1 where a configuration is beyond a limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, action="append", choices=ARCHITECTURES)
    parser.add_argument("--kernel", action="append", choices=tuple(SPECS))
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args()
    started = time.perf_counter()
    results = compile_all(args.arch or ARCHITECTURES, args.kernel or tuple(SPECS))
    print(format_report(results))
    unsound = sum(bool(result.problems()) for result in results)
    print(
        f"{len(results)} kernels compiled in {time.perf_counter() - started:.0f} s, {unsound} "
        "beyond a limit. Compiled only: nothing was run or timed on a GPU."
    )
    if args.json:
        args.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    raise SystemExit(1 if unsound else 0)


if __name__ == "__main__":
    main()
