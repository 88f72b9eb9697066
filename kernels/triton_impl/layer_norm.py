"""LayerNorm over rows: forward from known statistics, and backward with the weights' gradients."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import launch_config
from kernels.triton_impl.column_sum import column_sum
from kernels.triton_impl.row_blocks import contiguous, load_row, row_blocks, store_row

# Programs of the backward, each with its own partial sums. Fixed: were it the number of SMs, the
# weights' gradients would have other bits on another card.
PROGRAMS = 512


@triton.jit
def norm_kernel(
    pooled,  # [M, C]
    mean,  # [M]
    rstd,  # [M]
    norm_weight,  # [C]
    norm_bias,  # [C]
    normed,  # [M, C]
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):
    row = tl.program_id(0)
    at = row.to(tl.int64) * C
    row_mean, row_rstd = tl.load(mean + row), tl.load(rstd + row)
    unit = (load_row(pooled + at, 0, BLOCK, C) - row_mean) * row_rstd
    scaled = unit * load_row(norm_weight, 0, BLOCK, C)
    store_row(normed + at, scaled + load_row(norm_bias, 0, BLOCK, C), 0, BLOCK, C)
    if TAIL > 0:
        unit = (load_row(pooled + at, BLOCK, TAIL, C) - row_mean) * row_rstd
        scaled = unit * load_row(norm_weight, BLOCK, TAIL, C)
        store_row(normed + at, scaled + load_row(norm_bias, BLOCK, TAIL, C), BLOCK, TAIL, C)


def norm(
    pooled: Tensor, mean: Tensor, rstd: Tensor, norm_weight: Tensor, norm_bias: Tensor
) -> Tensor:
    """LayerNorm of pooled [M, C] with known statistics: [M, C]."""
    rows, channels = pooled.shape
    pooled, norm_weight, norm_bias = contiguous(pooled, norm_weight, norm_bias)
    normed = torch.empty((rows, channels), dtype=pooled.dtype, device=pooled.device)
    config = launch_config("norm", rows, pooled, C=channels)
    norm_kernel[(rows,)](
        pooled,
        mean,
        rstd,
        norm_weight,
        norm_bias,
        normed,
        **row_blocks(channels),
        **config.options,
    )
    return normed


@triton.jit(do_not_specialize=["M"])
def norm_backward_kernel(
    grad,  # [M, C], of normed
    pooled,  # [M, C]
    mean,  # [M]
    rstd,  # [M]
    norm_weight,  # [C]
    norm_bias,  # [C]
    grad_pooled,  # [M, C]
    normed,  # [M, C]
    parts,  # [programs, 2, C], sums of the weight's and the bias's gradient
    M,
    KEEP_GRAD: tl.constexpr,
    KEEP_NORMED: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):
    program = tl.program_id(0)
    weight_main = load_row(norm_weight, 0, BLOCK, C)
    weight_sum_main = tl.zeros([BLOCK], tl.float32)
    bias_sum_main = tl.zeros([BLOCK], tl.float32)
    weight_sum_tail = tl.zeros([TAIL if TAIL > 0 else 1], tl.float32)
    bias_sum_tail = tl.zeros([TAIL if TAIL > 0 else 1], tl.float32)
    for ahead in range(0, M - program, tl.num_programs(0)):
        row = program.to(tl.int64) + ahead
        at = row * C
        row_mean, row_rstd = tl.load(mean + row), tl.load(rstd + row)
        grad_main = load_row(grad + at, 0, BLOCK, C)
        unit_main = (load_row(pooled + at, 0, BLOCK, C) - row_mean) * row_rstd
        weighted_main = grad_main * weight_main
        along = tl.sum(weighted_main * unit_main, axis=0)
        shift = tl.sum(weighted_main, axis=0)
        weight_sum_main += grad_main * unit_main
        bias_sum_main += grad_main
        if TAIL > 0:
            # Beyond C grad and weight are zero, so unit needs no mask.
            grad_tail = load_row(grad + at, BLOCK, TAIL, C)
            unit_tail = (load_row(pooled + at, BLOCK, TAIL, C) - row_mean) * row_rstd
            weighted_tail = grad_tail * load_row(norm_weight, BLOCK, TAIL, C)
            along += tl.sum(weighted_tail * unit_tail, axis=0)
            shift += tl.sum(weighted_tail, axis=0)
            weight_sum_tail += grad_tail * unit_tail
            bias_sum_tail += grad_tail
        along, shift = along / C, shift / C
        if KEEP_GRAD:
            found = (weighted_main - unit_main * along - shift) * row_rstd
            store_row(grad_pooled + at, found, 0, BLOCK, C)
        if KEEP_NORMED:
            again = unit_main * weight_main + load_row(norm_bias, 0, BLOCK, C)
            store_row(normed + at, again, 0, BLOCK, C)
        if TAIL > 0:
            if KEEP_GRAD:
                found = (weighted_tail - unit_tail * along - shift) * row_rstd
                store_row(grad_pooled + at, found, BLOCK, TAIL, C)
            if KEEP_NORMED:
                again = unit_tail * load_row(norm_weight, BLOCK, TAIL, C)
                again += load_row(norm_bias, BLOCK, TAIL, C)
                store_row(normed + at, again, BLOCK, TAIL, C)
    part = parts + program.to(tl.int64) * (2 * C)
    store_row(part, weight_sum_main, 0, BLOCK, C)
    store_row(part + C, bias_sum_main, 0, BLOCK, C)
    if TAIL > 0:
        store_row(part, weight_sum_tail, BLOCK, TAIL, C)
        store_row(part + C, bias_sum_tail, BLOCK, TAIL, C)


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
    """Gradients of pooled [M, C], the weight and the bias (float32, [C]); normed again.

    grad: of normed, [M, C]. The first is [0, C] unless `keep_grad`, the last unless `keep_normed`.
    """
    rows, channels = pooled.shape
    grad, pooled, norm_weight, norm_bias = contiguous(grad, pooled, norm_weight, norm_bias)
    programs = min(PROGRAMS, rows)
    grad_pooled, normed = (
        torch.empty((rows if keep else 0, channels), dtype=pooled.dtype, device=pooled.device)
        for keep in (keep_grad, keep_normed)
    )
    parts = torch.empty((programs, 2 * channels), dtype=torch.float32, device=pooled.device)
    config = launch_config("norm_backward", rows, pooled, C=channels)
    norm_backward_kernel[(programs,)](
        grad,
        pooled,
        mean,
        rstd,
        norm_weight,
        norm_bias,
        grad_pooled,
        normed,
        parts,
        rows,
        KEEP_GRAD=keep_grad,
        KEEP_NORMED=keep_normed,
        **row_blocks(channels),
        **config.options,
    )
    sums = column_sum(parts)
    return grad_pooled, sums[:channels], sums[channels:], normed
