"""The token-adaptive projector as one op: pool each tile to its own h x w tokens, then project."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.arguments import (
    check_choice,
    check_grid,
    check_weights,
    shapes_tensor,
    sides_tensor,
)
from kernels.dispatch import GEMM_CHOICES, IMPLEMENTATIONS
from kernels.registration import Options, projector_forward

BACKWARD_MODES = ("save", "recompute")


def jagged_projector(
    x: Tensor,
    shapes: Sequence[Sequence[int]] | Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    *,
    pool: str = "adaptive",
    backward: str = "save",
    impl: str = "auto",
    gemm: str = "auto",
    eps: float = 1e-5,
) -> Tensor:
    """Pool each tile's H x W patches to its own h x w tokens, any mix in one launch, and project.

    TokenFLEX (arXiv 2504.03154), section 3, for tiles of any shape: pool -> LayerNorm(C) ->
    silu(. w1 + b1) * (. w2 + b2) -> w3 + b3. Everything between the matrix products is computed in
    float32 (float64 for float64) and rounded once to x's dtype; the products are torch's own, and
    accumulate as those do. Forward and backward give the same bits every time.

    x: [P, C], the patches of all tiles, one tile after the other, row by row; of bfloat16, float16,
        float32 or float64. P = sum of H * W; it may be 0: the result is then empty, but still part
        of the graph.
    shapes: H, W, h, w of each tile, 1 to 1024 each, on the host: a sequence of four int each, or
        an integer CPU tensor [T, 4]. h may exceed H, and w W. Under torch.compile give the tensor:
        a list is part of what is compiled.
    norm_weight, norm_bias: [C], in x's dtype or float32. w1, w2: [F, C]. b1, b2: [F]. w3: [D, F].
        b3: [D]. In x's dtype, as `torch.nn.Linear` keeps them. Under autocast x and they are cast.
    pool: "adaptive" or "resize", see `kernels.tables`. eps: of the LayerNorm.
    backward: "save" keeps the pooled rows and both gates, "recompute" the pooled rows only, for
        two more matrix products in backward.
    impl: "triton" (a GPU, or the interpreter), "torch", or "auto": Triton wherever it can run.
    gemm: "cublas" leaves matrix products to torch, "fused" takes kernels with the SwiGLU in their
        epilogue (Triton, bfloat16 and float16), "auto" what `kernels.launch` says is faster.

    Returns [M, D] in x's dtype, M = sum of h * w, tile after tile in the order given, row by row.
    Raises ValueError when sizes, dtypes, devices, shapes or a choice do not fit.
    """
    check_choice("backward", backward, BACKWARD_MODES)
    check_choice("impl", impl, IMPLEMENTATIONS)
    check_choice("gemm", gemm, GEMM_CHOICES)
    weights: tuple[Tensor, ...] = (norm_weight, norm_bias, w1, b1, w2, b2, w3, b3)
    if torch.is_autocast_enabled(x.device.type):
        x, weights = _autocast(x, weights)
    check_weights(x, weights, pool)
    needs_backward = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights))
    options = Options(pool, backward if needs_backward else "none", impl, gemm, eps)
    out, *_ = projector_forward(x, shapes_tensor(shapes), *weights, options.encode())
    return out


def token_adaptive_projector(
    x: Tensor,
    tile_sides: Sequence[int] | Tensor,
    *weights: Tensor,
    grid: tuple[int, int],
    **options: Any,
) -> Tensor:
    """`jagged_projector` of tiles of one grid (H, W), each to its own n x n tokens.

    x: [T, H*W, C]. tile_sides: one n >= 1 per tile, on the host: a sequence of int or an integer
    CPU tensor [T]. The rest as there. Returns [M, D], M = sum of n^2.
    """
    check_grid(x, grid)
    sides = sides_tensor(tile_sides, x.shape[0])
    height, width = grid
    patches = [torch.full_like(sides, height), torch.full_like(sides, width)]
    shapes = torch.stack([*patches, sides, sides], dim=1)
    return jagged_projector(x.flatten(0, 1), shapes, *weights, **options)


def _autocast(x: Tensor, weights: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """x and the matrices in autocast's dtype; the norm stays as it is, being wide inside."""
    dtype = torch.get_autocast_dtype(x.device.type)
    keep_norm = [w if w.dtype == torch.float32 else w.to(dtype) for w in weights[:2]]
    return x.to(dtype), (*keep_norm, *(w.to(dtype) for w in weights[2:]))
