"""What the tuner tries: each kernel's launch on random data, and its configurations."""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kernels.launch import LaunchConfig
from kernels.passes import gates, through_swiglu
from kernels.profile.baselines import EPS
from kernels.profile.cases import Case
from kernels.profile.random_inputs import make_inputs

_BLOCKS = {"BLOCK_M": (64, 128, 256), "BLOCK_N": (64, 128, 256), "BLOCK_K": (32, 64)}
# What is tried of each kernel: about 160 configurations with the warps and stages, each compiled.
CONSTANTS: dict[str, dict[str, tuple[int, ...]]] = {
    "pool_norm": {"WINDOW": (1, 2, 4, 8)},
    "norm": {},
    "norm_backward": {},
    "pool_backward": {"WINDOW": (1, 2, 4)},
    "swiglu": {"BLOCK": (1024, 2048, 4096, 8192)},
    "swiglu_backward": {"BLOCK_M": (8, 16, 32), "BLOCK_N": (64, 128, 256)},
    "column_sum": {"BLOCK_M": (16, 32, 64), "BLOCK_N": (16, 32, 64)},
    "dual_gemm": {**_BLOCKS, "GROUP_M": (8,)},
    "gate_gemm": {**_BLOCKS, "GROUP_M": (8,)},
}
MAX_ACCUMULATORS = 128  # float32 registers per thread; with more, a kernel spills
BY_CUBLAS = " by cuBLAS"
Results = tuple[Tensor, ...]


@dataclass(frozen=True)
class TimedStep:
    """A launch to be timed; before: restores what it writes over."""

    run: Callable[[], Results]
    before: Callable[[], object] = lambda: None


def candidates(kernel: str) -> Iterator[LaunchConfig]:
    """The configurations worth a try."""
    constants, gemm = CONSTANTS[kernel], kernel.endswith("gemm")
    warps, stages = ((4, 8), (3, 4)) if gemm else ((2, 4, 8), (1,))
    for *values, num_warps, num_stages in itertools.product(*constants.values(), warps, stages):
        config = LaunchConfig(dict(zip(constants, values, strict=True)), num_warps, num_stages)
        if not gemm or _gemm_fits(kernel, config):
            yield config


def _gemm_fits(kernel: str, config: LaunchConfig) -> bool:
    """Whether the accumulators are in registers and, with short blocks, the loads well ahead."""
    size = config.constants
    elements = size["BLOCK_M"] * size["BLOCK_N"] * (2 if kernel == "dual_gemm" else 1)
    ahead = size["BLOCK_K"] == 64 or config.num_stages == 4
    return ahead and elements <= MAX_ACCUMULATORS * 32 * config.num_warps


def build_steps(case: Case, device: torch.device) -> dict[str, TimedStep]:
    """Every kernel's step on random data; what follows a space in a name tells two of one kernel.

    The fused GEMMs only where they take the dtype, and cuBLAS in their place beside them.
    """
    from kernels import triton_impl as do
    from kernels.triton_impl.column_sum import column_sum
    from kernels.triton_impl.layer_norm import PROGRAMS
    from kernels.triton_impl.swiglu import ROWS

    inputs = make_inputs(case, device)
    x, w, grad = inputs.x.flatten(0, 1), inputs.weights, inputs.grad
    layout = case.layout(device)
    pooled, normed, mean, rstd = do.pool_norm(x, layout, w.norm_weight, w.norm_bias, EPS)
    gate, value, product = gates(do, normed, w, fused=False, keep_gates=True)
    upstream, grad_normed = product.clone(), torch.randn_like(pooled)

    def parts(rows: int, columns: int) -> TimedStep:
        summed = torch.randn(rows, columns, device=device)
        return TimedStep(lambda: (column_sum(summed),))

    steps = {
        "pool_norm": TimedStep(lambda: do.pool_norm(x, layout, w.norm_weight, w.norm_bias, EPS)),
        "norm": TimedStep(lambda: (do.norm(pooled, mean, rstd, w.norm_weight, w.norm_bias),)),
        "norm_backward": TimedStep(
            lambda: do.norm_backward(
                grad_normed, pooled, mean, rstd, w.norm_weight, w.norm_bias, True, True
            )
        ),
        "pool_backward": TimedStep(lambda: (do.pool_backward(grad_normed, layout),)),
        "swiglu": TimedStep(lambda: (do.swiglu(gate, value),)),
        "swiglu_backward": TimedStep(
            lambda: do.swiglu_backward(upstream, gate, value), lambda: upstream.copy_(product)
        ),
        "column_sum of the gates": parts(math.ceil(case.rows / ROWS), 2 * case.hidden),
        "column_sum of the norm": parts(min(PROGRAMS, case.rows), 2 * case.channels),
    }
    if case.torch_dtype == torch.float32:
        return steps
    for way, fused in (("", True), (BY_CUBLAS, False)):
        steps["dual_gemm" + way] = TimedStep(partial(gates, do, normed, w, fused, keep_gates=True))
        steps["gate_gemm" + way] = TimedStep(
            partial(through_swiglu, do, grad, w.w3, gate, value, fused, overwrite=False)
        )
    return steps
