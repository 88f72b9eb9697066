"""The token-adaptive projector in plain PyTorch under autograd: what the op must equal.

It rounds where the op rounds. Shapes: T tiles, H x W patches, C channels, F hidden, D output,
M = sum of n^2 output rows.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.arguments import check_grid, check_weights, sides_tensor
from kernels.pooling import pool_tiles
from kernels.tile_layout import square_shapes, tile_layout


def projector_reference(
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
    eps: float = 1e-5,
) -> Tensor:
    """Pool each tile to its own n x n tokens and project them.

    TokenFLEX (arXiv 2504.03154), section 3.

    pool -> LayerNorm(C) -> silu(x w1 + b1) * (x w2 + b2) -> w3 + b3. Everything between two matrix
    products is computed in float32 (float64 for float64 input) and rounded once; the pooled rows
    are rounded to the weights' dtype before the norm.

    x: [T, H*W, C], patches row by row. T may be 0: the result is then empty, but still part of the
    graph.
    tile_sides: one n per tile, on the host: a sequence of int or an integer CPU tensor [T].
    norm_weight, norm_bias: [C]. w1, w2: [F, C]. b1, b2: [F]. w3: [D, F]. b3: [D]. As
    `torch.nn.Linear` keeps them.
    grid: (H, W). pool: "adaptive" or "resize", see `kernels.tables`. eps: of the LayerNorm.
    Returns [M, D] in the weights' dtype, tile after tile in the order given, each tile row by row.

    Raises ValueError when shapes, dtypes, devices, sides, grid or pool mode do not fit.
    """
    check_grid(x, grid)
    patches, weights = x.flatten(0, 1), (norm_weight, norm_bias, w1, b1, w2, b2, w3, b3)
    check_weights(patches, weights, pool)
    sides = sides_tensor(tile_sides, len(x)).tolist()
    layout = tile_layout(square_shapes(sides, grid), pool, torch.device("cpu"))
    wide = torch.promote_types(x.dtype, torch.float32)
    pooled = pool_tiles(patches, layout).to(x.dtype).to(wide)
    normed = F.layer_norm(pooled, (x.shape[2],), norm_weight.to(wide), norm_bias.to(wide), eps)
    normed = normed.to(x.dtype)
    gate, value = F.linear(normed, w1, b1), F.linear(normed, w2, b2)
    gated = (F.silu(gate.to(wide)) * value.to(wide)).to(x.dtype)
    return F.linear(gated, w3, b3)
