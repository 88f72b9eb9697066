"""Which kernels there are to compile ahead of time, and how to make each one launch.

Each step of the op is called on uninitialised CPU tensors of the flagship's shape, with Triton's
launch replaced by a recorder. Nothing here needs a GPU.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from kernels import launch, triton_impl
from kernels.tile_layout import TileLayout, square_shapes, tile_layout
from kernels.triton_impl.column_sum import column_sum
from kernels.triton_impl.dual_gemm import dual_gemm_swiglu
from kernels.triton_impl.gate_gemm import gate_gemm_backward

ARCHITECTURES = (80, 90, 100)
GRID, HIDDEN, OUT = (27, 27), 3456, 2048
CHANNELS = (1152, 1024)  # SigLIP so400m, in two blocks per row; a power of two, in one
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _empty(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def _layout(rows: int) -> TileLayout:
    """A batch of `rows` tokens."""
    shapes = square_shapes([16] * (rows // 256) + [1] * (rows % 256), GRID)
    return tile_layout(shapes, "adaptive", torch.device("cpu"))


def _pool_norm(dtype: torch.dtype, rows: int, channels: int) -> None:
    layout, weight = _layout(rows), _empty(dtype, channels)
    x = _empty(dtype, layout.patches, channels)
    for keep in (True, False):
        triton_impl.pool_norm(x, layout, weight, weight, 1e-5, keep_pooled=keep)


def _norm(dtype: torch.dtype, rows: int, channels: int) -> None:
    statistic, weight = _empty(torch.float32, rows), _empty(dtype, channels)
    triton_impl.norm(_empty(dtype, rows, channels), statistic, statistic, weight, weight)


def _norm_backward(dtype: torch.dtype, rows: int, channels: int) -> None:
    statistic, weight = _empty(torch.float32, rows), _empty(dtype, channels)
    row = _empty(dtype, rows, channels)
    for frozen in (True, False):
        for keep in (True, False):
            triton_impl.norm_backward(
                row, row, statistic, statistic, weight, weight, not frozen, keep
            )


def _pool_backward(dtype: torch.dtype, rows: int, channels: int) -> None:
    triton_impl.pool_backward(_empty(dtype, rows, channels), _layout(rows))


def _swiglu(dtype: torch.dtype, rows: int, _: int) -> None:
    triton_impl.swiglu(_empty(dtype, rows, HIDDEN), _empty(dtype, rows, HIDDEN))


def _swiglu_backward(dtype: torch.dtype, rows: int, _: int) -> None:
    grad, gate, value = (_empty(dtype, rows, HIDDEN) for _ in range(3))
    triton_impl.swiglu_backward(grad, gate, value)


def _column_sum(_: torch.dtype, rows: int, channels: int) -> None:
    column_sum(_empty(torch.float32, rows, channels))


def _dual_gemm(dtype: torch.dtype, rows: int, channels: int) -> None:
    weight, bias = _empty(dtype, HIDDEN, channels), _empty(dtype, HIDDEN)
    normed = _empty(dtype, rows, channels)
    for keep in (True, False):
        dual_gemm_swiglu(normed, weight, bias, weight, bias, keep_gates=keep)


def _gate_gemm(dtype: torch.dtype, rows: int, _: int) -> None:
    gate = _empty(dtype, rows, HIDDEN)
    gate_gemm_backward(_empty(dtype, rows, OUT), _empty(dtype, OUT, HIDDEN), gate, gate)


@dataclass(frozen=True)
class KernelSpec:
    """How to make one kernel of the table launch: `run(dtype, rows, channels)`.

    kernel: the name of the Triton function; what else the step launches has its own spec.
    """

    kernel: str
    run: Callable[[torch.dtype, int, int], None]
    dtypes: tuple[str, ...] = ("bf16", "fp16", "fp32")
    channels: tuple[int, ...] = CHANNELS


# The slowest to compile first: they would otherwise keep one process busy at the end.
SPECS: dict[str, KernelSpec] = {
    "gate_gemm": KernelSpec("_gate_gemm", _gate_gemm, ("bf16", "fp16"), CHANNELS[:1]),
    "dual_gemm": KernelSpec("_dual_gemm", _dual_gemm, ("bf16", "fp16"), CHANNELS[:1]),
    "norm_backward": KernelSpec("norm_backward_kernel", _norm_backward),
    "pool_norm": KernelSpec("pool_norm_kernel", _pool_norm),
    "pool_backward": KernelSpec("pool_backward_kernel", _pool_backward),
    "norm": KernelSpec("norm_kernel", _norm),
    "swiglu_backward": KernelSpec(
        "swiglu_backward_kernel", _swiglu_backward, channels=CHANNELS[:1]
    ),
    "swiglu": KernelSpec("swiglu_kernel", _swiglu, channels=CHANNELS[:1]),
    "column_sum": KernelSpec("column_sum_kernel", _column_sum, ("fp32",), CHANNELS[:1]),
}


@dataclass(frozen=True)
class Job:
    """One entry of the table for one dtype and number of channels."""

    name: str
    dtype: str
    arch: int
    bucket: int
    channels: int


def jobs(archs: Iterable[int] = ARCHITECTURES, kernels: Iterable[str] = tuple(SPECS)) -> list[Job]:
    """All entries of the shipped table for these architectures and kernels."""
    return [
        Job(name, dtype, arch, bucket, channels)
        for name in kernels
        for arch in archs
        for bucket in launch.TABLE[f"sm_{arch}"][name]
        for dtype in SPECS[name].dtypes
        for channels in SPECS[name].channels
    ]


Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]  # kernel, its arguments and options


def launches(job: Job, more_rows: int = 0) -> list[Launch]:
    """What the job's step would launch on its architecture, for its fewest rows and some more."""
    spec, recorded = SPECS[job.name], list[Launch]()

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        if kernel.__name__ == spec.kernel:
            recorded.append((kernel, args, options))

    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(launch, "architecture", lambda _: f"sm_{job.arch}"),
    ):
        spec.run(DTYPES[job.dtype], (1 << job.bucket) + more_rows, job.channels)
    if not recorded:
        raise RuntimeError(f"the step of {job.name} launched no {spec.kernel}; correct SPECS")
    return recorded


def describe(job: Job, options: dict[str, Any]) -> str:
    """The arguments that tell one launch of a kernel from another."""
    hidden = {"INTERPRET", "COLUMNS", "EPS", "C", "F", "D"}
    shown = {k: v for k, v in options.items() if k.isupper() and k not in hidden}
    constants = " ".join(f"{k}={int(v)}" for k, v in shown.items())
    return (
        f"rows>={1 << job.bucket} C={job.channels} {constants} "
        f"warps={options['num_warps']} stages={options['num_stages']}"
    )
