"""The SwiGLU between the matrix products, elementwise: forward, and backward with bias sums."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import launch_config
from kernels.triton_impl.column_sum import column_sum

# Rows one program of the backward sums up. Fixed, so that the bits depend on M alone.
ROWS = 128


@triton.jit  # specialised on `total`, which F keeps divisible by 16: else loads are 2 bytes wide
def swiglu_kernel(gate, value, product, total, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < total
    a = tl.load(gate + at, mask=mask).to(tl.float32)
    b = tl.load(value + at, mask=mask).to(tl.float32)
    tl.store(product + at, (a * tl.sigmoid(a) * b).to(product.dtype.element_ty), mask=mask)


def swiglu(gate: Tensor, value: Tensor) -> Tensor:
    """silu(gate) * value, all [M, F]."""
    product = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    config = launch_config("swiglu", gate.shape[0], gate, F=gate.shape[1])
    swiglu_kernel[(triton.cdiv(gate.numel(), config.constants["BLOCK"]),)](
        gate,
        value,
        product,
        gate.numel(),
        **config.options,
    )
    return product


@triton.jit(do_not_specialize=["M"])
def swiglu_backward_kernel(
    grad,  # [M, F], of the product; the product takes its place
    gate,  # [M, F]
    value,  # [M, F]
    grad_gate,  # [M, F]
    grad_value,  # [M, F]
    parts,  # [M / ROWS, 2, F], column sums of both gradients
    M,
    F,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    part = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    gate_sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    value_sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    element = gate.dtype.element_ty
    for start in range(0, ROWS, BLOCK_M):
        row = part * ROWS + start + tl.arange(0, BLOCK_M)
        mask = (row < M)[:, None] & (column < F)[None, :]
        at = row.to(tl.int64)[:, None] * F + column[None, :]
        upstream = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        a = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(value + at, mask=mask, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(a)
        found_gate = (upstream * b * sigmoid * (1 + a * (1 - sigmoid))).to(element)
        found_value = (upstream * a * sigmoid).to(element)
        tl.store(grad_gate + at, found_gate, mask=mask)
        tl.store(grad_value + at, found_value, mask=mask)
        tl.store(grad + at, (a * sigmoid * b).to(element), mask=mask)
        gate_sums += found_gate.to(tl.float32)
        value_sums += found_value.to(tl.float32)
    at = part.to(tl.int64) * (2 * F) + column
    tl.store(parts + at, tl.sum(gate_sums, axis=0), mask=column < F)
    tl.store(parts + at + F, tl.sum(value_sums, axis=0), mask=column < F)


def swiglu_backward(
    grad: Tensor, gate: Tensor, value: Tensor, overwrite: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of gate and value, the product again, and both gradients' column sums.

    grad, gate, value: [M, F], contiguous. Returns three [M, F], then two [F] in float32. grad is
    overwritten; with `overwrite` gate and value are too.
    """
    rows, hidden = gate.shape
    grad_gate = gate if overwrite else torch.empty_like(gate)
    grad_value = value if overwrite else torch.empty_like(value)
    config = launch_config("swiglu_backward", rows, gate, F=hidden)
    row_parts = triton.cdiv(rows, ROWS)
    parts = torch.empty((row_parts, 2 * hidden), dtype=torch.float32, device=gate.device)
    swiglu_backward_kernel[(row_parts, triton.cdiv(hidden, config.constants["BLOCK_N"]))](
        grad,
        gate,
        value,
        grad_gate,
        grad_value,
        parts,
        rows,
        hidden,
        ROWS=ROWS,
        **config.options,
    )
    sums = column_sum(parts)
    return grad_gate, grad_value, grad, sums[:hidden], sums[hidden:]
