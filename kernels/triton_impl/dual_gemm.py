"""Both GEMMs of the gated MLP in one launch, with SwiGLU as their epilogue.

A program holds two accumulators for one output tile, so each tile of the normed tokens is read from
shared memory once for both, and the gated product never makes a trip through memory. W1 and W2 stay
the two tensors that the module owns: packing them would be a copy per step under ZeRO-3.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import launch_config
from kernels.triton_impl.gemm_tiles import (
    check_operands,
    fits_tma,
    grouped_tile,
    load_tile,
    operand,
)

INTERPRET = triton.knobs.runtime.interpret


def dual_gemm_swiglu(
    normed: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *, keep_gates: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """a = normed w1^T + b1, b = normed w2^T + b2, s = silu(a) * b.

    normed: [M, C], M >= 1. w1, w2: [F, C]. b1, b2: [F]. All bfloat16 or all float16.
    Returns (s, a, b), each [M, F] in the weights' dtype; a and b are None unless keep_gates. a and
    b are accumulated in float32 and rounded; s is computed in float32 from the rounded a and b, so
    that it is the same with and without keep_gates and as a backward that recomputes it.

    Raises ValueError for other dtypes.
    """
    check_operands("the fused dual GEMM", normed=normed, w1=w1, b1=b1, w2=w2, b2=b2)
    normed, w1, w2 = normed.contiguous(), w1.contiguous(), w2.contiguous()
    rows, channels = normed.shape
    hidden = w1.shape[0]
    gated = torch.empty(rows, hidden, dtype=w1.dtype, device=normed.device)
    a = torch.empty_like(gated) if keep_gates else None
    b = torch.empty_like(gated) if keep_gates else None
    config = launch_config("dual_gemm", rows, normed, C=channels, F=hidden)
    block_m, block_n, block_k = (config.constants[f"BLOCK_{axis}"] for axis in "MNK")
    use_tma = fits_tma(normed, w1, w2)
    programs = triton.cdiv(rows, block_m) * triton.cdiv(hidden, block_n)
    _dual_gemm[(programs,)](
        operand(normed, (block_m, block_k), use_tma),
        operand(w1, (block_n, block_k), use_tma),
        b1.contiguous(),
        operand(w2, (block_n, block_k), use_tma),
        b2.contiguous(),
        gated,
        a,
        b,
        rows,
        C=channels,
        F=hidden,
        KEEP_GATES=keep_gates,
        USE_TMA=use_tma,
        INTERPRET=INTERPRET,
        **config.options,
    )
    return gated, a, b


@triton.jit(do_not_specialize=["M"])
def _dual_gemm(
    normed,
    w1,
    b1,
    w2,
    b2,
    gated,
    a,
    b,
    M,
    C: tl.constexpr,
    F: tl.constexpr,
    KEEP_GATES: tl.constexpr,
    USE_TMA: tl.constexpr,
    INTERPRET: tl.constexpr,  # there the dot of bf16 operands is garbage: they are upcast
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One [BLOCK_M, BLOCK_N] tile of s, and of a and b where they are kept."""
    row_block, column_block = grouped_tile(M, F, BLOCK_M, BLOCK_N, GROUP_M)
    row, column = row_block * BLOCK_M, column_block * BLOCK_N
    acc_a = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc_b = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, C, BLOCK_K):
        x = load_tile(normed, row, k, M, C, BLOCK_M, BLOCK_K, USE_TMA, INTERPRET)
        w = load_tile(w1, column, k, F, C, BLOCK_N, BLOCK_K, USE_TMA, INTERPRET)
        acc_a = tl.dot(x, w.T, acc_a)
        w = load_tile(w2, column, k, F, C, BLOCK_N, BLOCK_K, USE_TMA, INTERPRET)
        acc_b = tl.dot(x, w.T, acc_b)

    r = row + tl.arange(0, BLOCK_M)
    c = column + tl.arange(0, BLOCK_N)
    dtype = gated.dtype.element_ty
    offsets = r.to(tl.int64)[:, None] * F + c[None, :]
    mask = (r < M)[:, None] & (c < F)[None, :]
    gate = (acc_a + tl.load(b1 + c, c < F, other=0.0).to(tl.float32)[None, :]).to(dtype)
    linear = (acc_b + tl.load(b2 + c, c < F, other=0.0).to(tl.float32)[None, :]).to(dtype)
    if KEEP_GATES:
        tl.store(a + offsets, gate, mask)
        tl.store(b + offsets, linear, mask)
    gate32 = gate.to(tl.float32)
    product = gate32 * tl.sigmoid(gate32) * linear.to(tl.float32)
    tl.store(gated + offsets, product.to(dtype), mask)
