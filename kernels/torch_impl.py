"""The op's steps in plain PyTorch: used on a CPU, in float64, and where Triton is missing.

Each function has its twin in `kernels.triton_impl`, with the same arguments and rounding points:
float32 inside (float64 for float64), each result rounded once to the dtype of its input.
"""

import torch
from torch import Tensor

from kernels.pooling import pool_tiles, unpool_tiles
from kernels.tile_layout import TileLayout


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def pool_norm(
    x: Tensor,
    layout: TileLayout,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    keep_pooled: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pool x [P, C] and normalise: (pooled [M, C], normed [M, C], mean [M], rstd [M]).

    pooled is [0, C] unless `keep_pooled`. mean and rstd are float32 (float64 for float64).
    """
    pooled = pool_tiles(x, layout).to(x.dtype)
    rows = _wide(pooled)
    mean = rows.mean(1)
    rstd = torch.rsqrt((rows - mean[:, None]).square().mean(1) + eps)
    normed = norm(pooled, mean, rstd, norm_weight, norm_bias)
    return pooled if keep_pooled else pooled.new_empty(0, x.shape[1]), normed, mean, rstd


def norm(
    pooled: Tensor, mean: Tensor, rstd: Tensor, norm_weight: Tensor, norm_bias: Tensor
) -> Tensor:
    """LayerNorm of pooled [M, C] with known statistics: [M, C]."""
    rows = (_wide(pooled) - mean[:, None]) * rstd[:, None]
    return torch.addcmul(norm_bias.to(rows.dtype), rows, norm_weight.to(rows.dtype)).to(
        pooled.dtype
    )


def swiglu(gate: Tensor, value: Tensor) -> Tensor:
    """silu(gate) * value, all [M, F]."""
    return (torch.nn.functional.silu(_wide(gate)) * _wide(value)).to(gate.dtype)


def swiglu_backward(
    grad: Tensor, gate: Tensor, value: Tensor, overwrite: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of gate and value, the product again, and both gradients' column sums.

    grad, gate, value: [M, F]. Returns three [M, F], then two [F] in float32 (or wider). grad may be
    overwritten, and with `overwrite` gate and value too; only the Triton version makes use of it.
    """
    upstream, a, b = _wide(grad), _wide(gate), _wide(value)
    sigmoid = torch.sigmoid(a)
    grad_gate = (upstream * b * sigmoid * (1 + a * (1 - sigmoid))).to(gate.dtype)
    grad_value = (upstream * a * sigmoid).to(gate.dtype)
    product = (a * sigmoid * b).to(gate.dtype)
    return grad_gate, grad_value, product, _wide(grad_gate).sum(0), _wide(grad_value).sum(0)


def norm_backward(
    grad: Tensor,
    pooled: Tensor,
    mean: Tensor,
    rstd: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    keep_grad: bool,
    keep_normed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of pooled [M, C], the weight and the bias (float32 or wider, [C]); normed again.

    grad: of normed, [M, C]. The first is [0, C] unless `keep_grad`, the last unless `keep_normed`.
    """
    upstream = _wide(grad)
    unit = (_wide(pooled) - mean[:, None]) * rstd[:, None]
    grad_pooled, normed = (pooled.new_empty(0, pooled.shape[1]) for _ in range(2))
    if keep_grad:
        weighted = upstream * norm_weight.to(unit.dtype)
        along = (weighted * unit).mean(1, keepdim=True)
        shift = weighted.mean(1, keepdim=True)
        grad_pooled = ((weighted - unit * along - shift) * rstd[:, None]).to(pooled.dtype)
    if keep_normed:
        normed = norm(pooled, mean, rstd, norm_weight, norm_bias)
    return grad_pooled, (upstream * unit).sum(0), upstream.sum(0), normed


def pool_backward(grad: Tensor, layout: TileLayout) -> Tensor:
    """The gradient of x [P, C] from that of pooled [M, C]."""
    return unpool_tiles(grad, layout).to(grad.dtype)
