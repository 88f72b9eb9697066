"""Measure launch configurations on this GPU and write a table for TOKENFLEX_TILES.

    python -m kernels.tune --out tiles.json
    TOKENFLEX_TILES=tiles.json sbatch slurm/pretrain.sh ...

Tuning is a separate step, never part of a run: the order of a sum follows the block sizes, so every
rank must launch the same. An entry replaces the shipped one only where every row of its results is
the same to rounding and it is faster, in two measurements, by more than two measurements of the
shipped one differ. Inputs are not in the L2 cache. An entry serves the dtype, widths and pooling it
was measured with, up to four times as many tokens; --shape measures others, into the same file.

What is measured is written at once: after a stop the same command goes on. Most of the time goes
into compiling, 1 to 2 s for each of about 160 configurations.
"""

import argparse
import json
import math
import signal
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import interpreting
from kernels.launch import TILES_VARIABLE, LaunchConfig, describe_target, shipped_config, trial
from kernels.profile.cases import SHAPE_HELP, Case, parse_shape
from kernels.profile.random_inputs import l2_bytes
from kernels.profile.results import write_json
from kernels.profile.system import describe_machine
from kernels.profile.timing import sample
from kernels.tables import POOL_MODES
from kernels.tune_trials import BY_CUBLAS, CONSTANTS, Results, TimedStep, build_steps, candidates

LEAST_GAIN = 0.02  # below this a change of the table is not worth its difference in bits
LARGEST_ERROR = 1e-2  # of a row, between two orders of summation in bfloat16


@dataclass(frozen=True)
class Tuned:
    """One kernel in one situation: the shipped entry's time, the best one's, which is kept.

    case: what it was measured on. fused: whether a fused GEMM beats cuBLAS with what is kept.
    """

    kernel: str
    rows: int
    situation: str
    case: str
    shipped_ms: float
    noise: float
    best_ms: float
    best: LaunchConfig
    kept: LaunchConfig
    speedup_over_cublas: float | None = None
    fused: bool = False


def median_ms(step: TimedStep, device: torch.device, samples: int) -> float:
    """Median time of a call whose inputs are not in the L2 cache."""
    flush = torch.empty(4 * l2_bytes(device), dtype=torch.uint8, device=device)

    def prepare(_: int) -> None:
        step.before()
        flush.zero_()

    return statistics.median(sample(prepare, lambda _: step.run(), device, samples, per_lead=20))


def tune_kernel(
    kernel: str, rows: int, step: TimedStep, device: torch.device, samples: int
) -> dict[str, Any]:
    """Time the shipped entry twice and every candidate once; the times and entries of `Tuned`."""
    _, shipped = shipped_config(kernel, rows, device)
    with trial(kernel, shipped):
        step.before()
        expected = tuple(result.clone() for result in step.run())
        first = median_ms(step, device, samples)
    best, best_ms = shipped, first
    for config in candidates(kernel):
        with trial(kernel, config):
            if config != shipped and _runs_right(step, expected):
                found = median_ms(step, device, samples)
                if found < best_ms:
                    best, best_ms = config, found
    with trial(kernel, best):  # again: the fastest of many may only have been lucky
        best_ms = max(best_ms, median_ms(step, device, samples))
    with trial(kernel, shipped):
        second = median_ms(step, device, samples)
    noise, shipped_ms = abs(first - second) / min(first, second), min(first, second)
    kept = best if shipped_ms / best_ms - 1 > max(noise, LEAST_GAIN) else shipped
    return {
        "shipped_ms": shipped_ms, "noise": noise, "best_ms": best_ms, "best": best, "kept": kept
    }  # fmt: skip


def _runs_right(step: TimedStep, expected: Results) -> bool:
    """Whether a configuration fits the GPU and gives what the shipped one gives, to rounding."""
    # What is not written shall not be a right result left in the memory that is used again.
    poison = [torch.full_like(result, math.nan) for result in expected]
    del poison
    try:
        step.before()
        found = step.run()
    except Exception as error:  # triton's own errors have no common class: too little memory, ...
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        return False
    return all(row_error(a, b) < LARGEST_ERROR for a, b in zip(found, expected, strict=True))


def row_error(found: Tensor, expected: Tensor) -> float:
    """The largest error of a row over the row's length, or over a tenth of the usual length.

    [M, C], or [M] as rows of one. Over all rows together a few wrong ones would not show.
    """
    rows = expected.float().reshape(-1, expected.shape[-1] if expected.ndim > 1 else 1)
    lengths = rows.norm(dim=1)
    least = (lengths.square().mean().sqrt() / 10).clamp_min(1e-30)
    errors = (found.float().reshape(rows.shape) - rows).norm(dim=1)
    return (errors / lengths.maximum(least)).max().item()


def _against_cublas(
    tuned: Tuned, steps: dict[str, TimedStep], device: torch.device, samples: int
) -> Tuned:
    """The same with how many times faster the fused GEMM is than cuBLAS and what follows it."""
    fused, cublas = steps[tuned.kernel], steps[tuned.kernel + BY_CUBLAS]
    with trial(tuned.kernel, tuned.kept):
        ours, theirs, again = (median_ms(step, device, samples) for step in (fused, cublas, fused))
    ratio = theirs / max(ours, again)
    return replace(tuned, speedup_over_cublas=ratio, fused=ratio > 1 + LEAST_GAIN)


def default_cases() -> list[Case]:
    """Mixed sides from 700 to 47,000 tokens, in both pooling modes."""
    mixed = ((8, 12, 16), (0.2, 0.3, 0.5))
    return [Case(*mixed, tiles=t, pool=pool) for t in (4, 16, 64, 256) for pool in POOL_MODES]


@torch.no_grad()
def tune(
    cases: Sequence[Case],
    kernels: Sequence[str],
    device: torch.device,
    samples: int,
    measured: Sequence[dict[str, Any]] = (),
) -> Iterator[Tuned]:
    """Every kernel in every case, but what `measured` (records of a table) has already."""
    done = {(record["kernel"], record["rows"], record["situation"]) for record in measured}
    for case in cases:
        steps = build_steps(case, device)
        for name, step in steps.items():
            kernel, cublas = name.partition(" ")[0], name + BY_CUBLAS
            if kernel not in kernels or name.endswith(BY_CUBLAS):
                continue
            # What it is looked up by is what its launch asks with: never written a second time.
            with trial(kernel, shipped_config(kernel, 1, device)[1]) as asked:
                step.run()
            rows, situation = asked[0]
            if (kernel, rows, situation) in done:
                continue
            done.add((kernel, rows, situation))
            times = tune_kernel(kernel, rows, step, device, samples)
            tuned = Tuned(kernel, rows, situation, case.name, **times)
            yield _against_cublas(tuned, steps, device, samples) if cublas in steps else tuned


def read_table(path: Path, device: torch.device, command: list[str]) -> dict[str, Any]:
    """The table to go on with; ValueError where it is none, or was measured on something else."""
    target = describe_target(device)
    if not path.exists():
        return {"target": target, "machine": describe_machine(device, command), "measured": []}
    try:
        table = json.loads(path.read_text())
        found, _ = table["target"], [Tuned(**record) for record in table["measured"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--out {path} exists and is no table of the tuner ({error!r}); name another file"
        ) from error
    if found != target:
        raise ValueError(
            f"--out {path} was measured on {found}, this is {target}; name another file"
        )
    return table


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.tune",
        description=__doc__,
        epilog=SHAPE_HELP.partition("Without --shape")[0]
        + "Without --shape: n=8/12/16,p=.2/.3/.5 with T = 4, 16, 64 and 256, in both modes.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("tiles.json"), help="where to write, or to go on")
    add("--kernel", action="append", choices=CONSTANTS, help="only this; repeat")
    add("--shape", action="append", default=[], help="a case, see below; repeat")
    add("--samples", type=int, default=20, help="timed calls per configuration (20)")
    args = parser.parse_args(argv)
    args.kernel = args.kernel or list(CONSTANTS)
    try:
        args.shape = [parse_shape(text) for text in args.shape] or default_cases()
    except ValueError as error:
        parser.error(f"--shape: {error}")
    if args.samples < 1:
        parser.error(f"--samples is {args.samples}; expected a whole number >= 1")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    command = ["python", "-m", "kernels.tune", *(sys.argv[1:] if argv is None else argv)]
    try:
        if (device.type == "cuda") == interpreting():
            raise ValueError(
                "no GPU found, or TRITON_INTERPRET is set beside one; the kernels are timed on the "
                "GPU they will run on (without one TRITON_INTERPRET=1 rehearses tiny --shape)"
            )
        table = read_table(args.out, device, command)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, table)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    measured = table["measured"]
    print(f"{len(measured)} measurements in {args.out}, where each is added as it comes")
    for tuned in tune(args.shape, args.kernel, device, args.samples, measured):
        measured.append(asdict(tuned))
        write_json(args.out, table)
        change = f"{tuned.shipped_ms / tuned.best_ms:.2f}x with {tuned.best}"
        ratio = tuned.speedup_over_cublas
        print(f"{tuned.kernel:16} M={tuned.rows:<7} shipped {tuned.shipped_ms:8.4f} ms, "
              + (change if tuned.kept == tuned.best else "stays")
              + (f", {ratio:.2f}x cuBLAS" if ratio else ""), flush=True)  # fmt: skip
    print(f"written to {args.out}; use it with {TILES_VARIABLE}={args.out}, on every rank")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    sys.exit(main())
