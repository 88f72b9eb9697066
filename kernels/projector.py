"""The token-adaptive projector as one op: pool each tile to its own n x n tokens, then project."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.arguments import check_choice, check_inputs, sides_tensor
from kernels.dispatch import GEMM_CHOICES, IMPLEMENTATIONS
from kernels.registration import Options, projector_forward

BACKWARD_MODES = ("save", "recompute")


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
    -> w3 + b3. Everything between the matrix products is computed in float32 (float64 for float64)
    and rounded once to x's dtype; the products are torch's own, and accumulate as those do. Forward
    and backward give the same bits every time.

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
    check_choice("gemm", gemm, GEMM_CHOICES)
    weights: tuple[Tensor, ...] = (norm_weight, norm_bias, w1, b1, w2, b2, w3, b3)
    if torch.is_autocast_enabled(x.device.type):
        x, weights = _autocast(x, weights)
    check_inputs(x, weights, grid, pool)
    sides = sides_tensor(tile_sides, x.shape[0])
    needs_backward = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights))
    options = Options(grid, pool, backward if needs_backward else "none", impl, gemm, eps)
    out, *_ = projector_forward(x, sides, *weights, options.encode())
    return out


def _autocast(x: Tensor, weights: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """x and the matrices in autocast's dtype; the norm stays as it is, being wide inside."""
    dtype = torch.get_autocast_dtype(x.device.type)
    keep_norm = [w if w.dtype == torch.float32 else w.to(dtype) for w in weights[:2]]
    return x.to(dtype), (*keep_norm, *(w.to(dtype) for w in weights[2:]))
