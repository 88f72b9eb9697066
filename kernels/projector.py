"""The token-adaptive projector as one op: pool each tile to its own n x n tokens, then project."""

import importlib.util
import logging
import os
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from kernels.checks import check_choice, check_inputs, sides_tensor
from kernels.launch import GEMM_CHOICES, fused_gemms
from kernels.registration import projector_forward

IMPLEMENTATIONS = ("auto", "triton", "torch")
BACKWARD_MODES = ("save", "recompute")
_TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_log = logging.getLogger(__name__)


def token_adaptive_projector(
    x: Tensor,
    tile_sides: Sequence[int] | Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    *,
    grid: tuple[int, int],
    pool: str = "adaptive",
    backward: str = "save",
    impl: str = "auto",
    gemm: str = "auto",
    eps: float = 1e-5,
) -> Tensor:
    """Pool each tile to its own n x n tokens and project them, any mix of n in one launch.

    TokenFLEX (arXiv 2504.03154), section 3: pool -> LayerNorm(C) -> silu(. w1 + b1) * (. w2 + b2)
    -> w3 + b3. Sums are accumulated in float32 (float64 for float64) and rounded to x's dtype
    between the steps. Forward and backward give the same bits every time.

    x: [T, H*W, C], patches row by row, of bfloat16, float16, float32 or float64. T may be 0: the
        result is then empty, but still part of the graph.
    tile_sides: one n >= 1 per tile, on the host: a sequence of int or an integer CPU tensor [T].
        Under torch.compile give the tensor: a list is part of what is compiled.
    norm_weight, norm_bias: [C], in x's dtype or float32. w1, w2: [F, C]. b1, b2: [F]. w3: [D, F].
        b3: [D]. In x's dtype, as `torch.nn.Linear` keeps them. Under autocast x and they are cast.
    grid: (H, W). pool: "adaptive" or "resize", see `kernels.tables`. eps: of the LayerNorm.
    backward: "save" keeps the pooled rows and both gates, "recompute" the pooled rows only, for
        two more matrix products in backward.
    impl: "triton" (a GPU, or the interpreter), "torch", or "auto": Triton wherever it can run.
    gemm: "cublas" leaves matrix products to torch, "fused" takes kernels with the SwiGLU in their
        epilogue (Triton, bfloat16 and float16), "auto" what `kernels.launch` says is faster.

    Returns [M, D] in x's dtype, M = sum of n^2, tile after tile in the order given, row by row.
    Raises ValueError when shapes, dtypes, devices, sides, grid or a choice do not fit.
    """
    check_choice("backward", backward, BACKWARD_MODES)
    check_choice("impl", impl, IMPLEMENTATIONS)
    check_choice("gemm", gemm, ("auto", *GEMM_CHOICES))
    weights = (norm_weight, norm_bias, w1, b1, w2, b2, w3, b3)
    if torch.is_autocast_enabled(x.device.type):
        x, weights = _autocast(x, weights)
    check_inputs(x, *weights, grid, pool)
    sides = sides_tensor(tile_sides, x.shape[0])
    impl = _implementation(impl, x)
    needs_backward = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights))
    out, *_ = projector_forward(
        x,
        sides,
        *weights,
        list(grid),
        pool,
        backward if needs_backward else "none",
        impl,
        _fused(gemm, impl, x),
        eps,
    )
    return out


def _autocast(x: Tensor, weights: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """x and the matrices in autocast's dtype; the norm stays as it is, being wide inside."""
    dtype = torch.get_autocast_dtype(x.device.type)
    keep_norm = [w if w.dtype == torch.float32 else w.to(dtype) for w in weights[:2]]
    return x.to(dtype), (*keep_norm, *(w.to(dtype) for w in weights[2:]))


def _implementation(impl: str, x: Tensor) -> str:
    """ "triton" or "torch"; ValueError where the one asked for cannot run."""
    if impl == "auto":
        runs = x.device.type == "cuda" and x.dtype in _TRITON_DTYPES and triton_found()
        return "triton" if runs else "torch"
    if impl == "torch":
        return impl
    if not triton_found():
        raise ValueError("impl is 'triton', but triton is not installed; use impl='auto'")
    if x.dtype not in _TRITON_DTYPES:
        raise ValueError(
            f"impl is 'triton', x is {x.dtype}; the kernels take bfloat16, float16 and float32: "
            "cast x and the weights, or use impl='torch'"
        )
    if x.device.type != "cuda" and not interpreting():
        raise ValueError(
            f"impl is 'triton', x is on {x.device}; move x and the weights to a GPU, use "
            "impl='torch', or set TRITON_INTERPRET=1 before Python starts"
        )
    return impl


def _fused(gemm: str, impl: str, x: Tensor) -> bool:
    """Whether the matrix products before and behind the SwiGLU are the fused kernels."""
    if gemm == "fused":
        if impl != "triton" or x.dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"gemm is 'fused' with impl {impl!r} and {x.dtype}; the fused kernels are Triton's "
                "and take bfloat16 and float16: use gemm='auto'"
            )
        return True
    half = x.dtype in (torch.bfloat16, torch.float16)
    return gemm == "auto" and impl == "triton" and half and fused_gemms(x.device)


@cache
def triton_found() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton runs its kernels on the CPU, in Python."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
