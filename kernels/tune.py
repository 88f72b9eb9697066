"""Measure launch configurations on this GPU and write a table for TOKENFLEX_TILES.

    python -m kernels.tune --out tiles.json
    TOKENFLEX_TILES=tiles.json sbatch slurm/pretrain.sh ...

Tuning is a separate step, never part of a run: the order of a sum follows the block sizes, so every
rank must launch the same. An entry replaces the shipped one only where its results are the same to
rounding and it is faster, in two measurements, by more than two measurements of the shipped one
differ. Most of the time goes into compiling; --kernel and --rows choose less.
"""

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from kernels.launch import (
    SAFE_DEFAULT,
    TABLE,
    TILES_VARIABLE,
    LaunchConfig,
    device_architecture,
    launch_config,
    trial,
)
from kernels.passes import Pooling
from kernels.profile.system import describe_machine
from kernels.profile.timing import time_call
from kernels.tile_layout import tile_layout

ROWS = (1024, 4096, 16384, 65536)
MAX_ACCUMULATORS = 128  # float32 registers per thread; with more, a kernel spills
LEAST_GAIN = 0.02  # below this a change of the table is not worth its difference in bits
Results = tuple[Tensor, ...]
Step = Callable[[], Results]


@dataclass(frozen=True)
class Shape:
    """Widths of the projector: channels C, hidden F, output D, and the patch grid."""

    channels: int = 1152
    hidden: int = 3456
    width: int = 2048
    grid: tuple[int, int] = (27, 27)


@dataclass(frozen=True)
class Tuned:
    """One kernel at one number of rows: the shipped entry's time, the best one's, what is kept."""

    kernel: str
    rows: int
    shipped_ms: float
    noise: float
    best_ms: float
    best: LaunchConfig
    replaces: bool


def candidates(kernel: str) -> Iterator[LaunchConfig]:
    """The configurations worth a try."""
    choices: dict[str, dict[str, tuple[int, ...]]] = {
        "pool_norm": {"WINDOW": (1, 2, 4, 8)},
        "pool_backward": {"WINDOW": (1, 2, 4)},
        "swiglu": {"BLOCK": (1024, 2048, 4096, 8192)},
        "swiglu_backward": {"BLOCK_M": (4, 8, 16, 32), "BLOCK_N": (64, 128, 256)},
        "column_sum": {"BLOCK_M": (16, 32, 64), "BLOCK_N": (16, 32, 64, 128)},
    }
    if kernel in ("dual_gemm", "gate_gemm"):
        blocks = {"BLOCK_M": (64, 128, 256), "BLOCK_N": (64, 128, 256), "BLOCK_K": (32, 64)}
        accumulators = 2 if kernel == "dual_gemm" else 1
        for config in _product({**blocks, "GROUP_M": (8,)}, warps=(4, 8), stages=(2, 3, 4)):
            elements = config.constants["BLOCK_M"] * config.constants["BLOCK_N"] * accumulators
            if elements <= MAX_ACCUMULATORS * 32 * config.num_warps:
                yield config
    else:
        yield from _product(choices.get(kernel, {}), warps=(1, 2, 4, 8), stages=(1,))


def _product(
    constants: dict[str, tuple[int, ...]], warps: tuple[int, ...], stages: tuple[int, ...]
) -> Iterator[LaunchConfig]:
    for *values, num_warps, num_stages in itertools.product(*constants.values(), warps, stages):
        yield LaunchConfig(dict(zip(constants, values, strict=True)), num_warps, num_stages)


def build_steps(rows: int, shape: Shape, device: torch.device) -> dict[str, Step]:
    """Every kernel's step on random bfloat16 data of `rows` tokens."""
    from kernels import triton_impl as do
    from kernels.triton_impl.column_sum import column_sum

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, device=device) * scale).bfloat16()

    channels, hidden, width = shape.channels, shape.hidden, shape.width
    side = 16 if rows % 256 == 0 else 1
    layout = tile_layout([side] * (rows // side**2), device)
    pooling = Pooling(layout, shape.grid, "adaptive")
    x = normal(len(layout.sides), math.prod(shape.grid), channels)
    weight, bias = normal(channels), normal(channels)
    pooled, _, mean, rstd = do.pool_norm(x, pooling, weight, bias, 1e-5)
    grad_pooled, grad = normal(rows, channels), normal(rows, width)
    gate, value, product = (normal(rows, hidden) for _ in range(3))
    w1, w2 = (normal(hidden, channels, scale=channels**-0.5) for _ in range(2))
    w3, hidden_bias = normal(width, hidden, scale=hidden**-0.5), normal(hidden)
    parts = torch.randn(max(1, rows // 128), hidden, device=device)
    return {
        "pool_norm": lambda: do.pool_norm(x, pooling, weight, bias, 1e-5),
        "norm": lambda: (do.norm(pooled, mean, rstd, weight, bias),),
        "norm_backward": lambda: do.norm_backward(
            grad_pooled, pooled, mean, rstd, weight, bias, True, True
        ),
        "pool_backward": lambda: (do.pool_backward(grad_pooled, pooling),),
        "swiglu": lambda: (do.swiglu(gate, value),),
        # Writes over its first argument; the copy's time is in every candidate's.
        "swiglu_backward": lambda: do.swiglu_backward(product.clone(), gate, value),
        "column_sum": lambda: (column_sum(parts),),
        "dual_gemm": lambda: _fused_dual(pooled, w1, w2, hidden_bias),
        "gate_gemm": lambda: do.gate_gemm_backward(grad, w3, gate, value),
        "cublas dual_gemm": lambda: _cublas_dual(pooled, w1, w2, hidden_bias),
        "cublas gate_gemm": lambda: do.swiglu_backward(torch.mm(grad, w3), gate, value),
    }


def _fused_dual(normed: Tensor, w1: Tensor, w2: Tensor, bias: Tensor) -> Results:
    from kernels import triton_impl as do

    product, gate, value = do.dual_gemm_swiglu(normed, w1, bias, w2, bias, keep_gates=True)
    assert gate is not None and value is not None
    return product, gate, value


def _cublas_dual(normed: Tensor, w1: Tensor, w2: Tensor, bias: Tensor) -> Results:
    from kernels import triton_impl as do

    gate, value = torch.addmm(bias, normed, w1.t()), torch.addmm(bias, normed, w2.t())
    return do.swiglu(gate, value), gate, value


def median_ms(step: Step, device: torch.device, min_ms: float) -> float:
    """Median time of one call."""
    return time_call(lambda _: None, lambda _: step(), device, min_ms).median_ms


def tune_kernel(kernel: str, step: Step, rows: int, device: torch.device, min_ms: float) -> Tuned:
    """Time the shipped entry twice and every candidate once."""
    shipped = launch_config(kernel, rows, device)
    expected = step()
    first = median_ms(step, device, min_ms)
    best, best_ms = shipped, math.inf
    for config in candidates(kernel):
        with trial(kernel, config):
            if config != shipped and _runs_right(step, expected):
                found = median_ms(step, device, min_ms)
                if found < best_ms:
                    best, best_ms = config, found
    with trial(kernel, best):  # again: the fastest of many may only have been lucky
        best_ms = max(best_ms, median_ms(step, device, min_ms)) if best != shipped else math.inf
    second = median_ms(step, device, min_ms)
    noise = abs(first - second) / min(first, second)
    shipped_ms = min(first, second)
    gain = shipped_ms / best_ms - 1
    return Tuned(
        kernel, rows, shipped_ms, noise, best_ms, best, replaces=gain > max(noise, LEAST_GAIN)
    )


def _runs_right(step: Step, expected: Results) -> bool:
    """Whether a configuration fits the GPU and gives what the shipped one gives, to rounding."""
    try:
        found = step()
    except Exception as error:  # triton's own errors have no common class: too little memory, ...
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        return False
    return all(_error(a, b) < 1e-2 for a, b in zip(found, expected, strict=True))


def _error(found: Tensor, expected: Tensor) -> float:
    difference = (found.float() - expected.float()).norm()
    return (difference / expected.float().norm().clamp_min(1e-30)).item()


def fused_wins(kernel: str, steps: dict[str, Step], device: torch.device, min_ms: float) -> float:
    """How many times faster the fused GEMM is than cuBLAS and the elementwise kernel."""
    fused, cublas = steps[kernel], steps[f"cublas {kernel}"]
    ours, theirs, again = (median_ms(step, device, min_ms) for step in (fused, cublas, fused))
    return theirs / max(ours, again)


def tune(
    kernels: list[str], rows: tuple[int, ...], shape: Shape, device: torch.device, min_ms: float
) -> tuple[list[Tuned], dict[str, dict[int, float]]]:
    """All kernels at all numbers of rows, and the fused GEMMs with their best entry vs cuBLAS."""
    results, ratios = list[Tuned](), dict[str, dict[int, float]]()
    with tqdm(total=len(kernels) * len(rows), disable=not sys.stderr.isatty()) as bar:
        for count in rows:
            steps = build_steps(count, shape, device)
            for kernel in kernels:
                bar.set_description(f"{kernel}, {count} rows")
                tuned = tune_kernel(kernel, steps[kernel], count, device, min_ms)
                results.append(tuned)
                if kernel in ("dual_gemm", "gate_gemm"):
                    chosen = tuned.best if tuned.replaces else launch_config(kernel, count, device)
                    with trial(kernel, chosen):
                        ratio = fused_wins(kernel, steps, device, min_ms)
                    ratios.setdefault(kernel, {})[count] = ratio
                bar.update()
    return results, ratios


def tiles_file(
    results: list[Tuned],
    ratios: dict[str, dict[int, float]],
    device: torch.device,
    command: list[str],
) -> dict[str, object]:
    """What TOKENFLEX_TILES reads, with what was measured beside it."""
    tiles: dict[str, dict[str, object]] = {}
    for tuned in results:
        if tuned.replaces:
            bucket = str(tuned.rows.bit_length() - 1)
            tiles.setdefault(tuned.kernel, {})[bucket] = asdict(tuned.best)
    # On only where it wins at every size that was measured: the choice has one answer per GPU.
    arch = device_architecture(device)
    fused = [name for name, by_rows in ratios.items() if min(by_rows.values()) > 1 + LEAST_GAIN]
    return {
        "tiles": {arch: tiles},
        "fused": {arch: fused},
        "fused_speedup_over_cublas": ratios,
        "measured": [asdict(tuned) for tuned in results],
        "machine": describe_machine(device, command),
    }


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = list(TABLE[SAFE_DEFAULT])
    parser.add_argument("--out", type=Path, default=Path("tiles.json"), help="where to write")
    parser.add_argument("--kernel", action="append", choices=names, help="only this (repeatable)")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS), help="values of M")
    parser.add_argument("--channels", type=int, default=Shape.channels, help="C of the ViT")
    parser.add_argument("--hidden", type=int, default=Shape.hidden, help="F of the projector")
    parser.add_argument("--width", type=int, default=Shape.width, help="D of the language model")
    parser.add_argument("--min-ms", type=float, default=50.0, help="timed work per candidate")
    args = parser.parse_args(argv)
    args.kernel = args.kernel or names
    if min(args.rows) < 1:
        parser.error(f"--rows is {min(args.rows)}; expected numbers of tokens, at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if not torch.cuda.is_available():
        print("error: no GPU found; tuning times the kernels on the GPU they will run on",
              file=sys.stderr)  # fmt: skip
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    shape = Shape(args.channels, args.hidden, args.width)
    results, ratios = tune(args.kernel, tuple(args.rows), shape, device, args.min_ms)
    for tuned in results:
        change = f"{tuned.shipped_ms / tuned.best_ms:.2f}x with {tuned.best}"
        print(f"{tuned.kernel:16} M={tuned.rows:<7} shipped {tuned.shipped_ms:8.4f} ms, "
              f"{change if tuned.replaces else 'stays'}")  # fmt: skip
    for kernel, by_rows in ratios.items():
        speed = ", ".join(f"{ratio:.2f}x at M={rows}" for rows, ratio in by_rows.items())
        print(f"{kernel} against cuBLAS and the elementwise kernel: {speed}")
    command = ["python", "-m", "kernels.tune", *(sys.argv[1:] if argv is None else argv)]
    content = tiles_file(results, ratios, device, command)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(content, indent=1))
    print(f"written to {args.out}; use it with {TILES_VARIABLE}={args.out}, on every rank")
    return 0


if __name__ == "__main__":
    sys.exit(main())
