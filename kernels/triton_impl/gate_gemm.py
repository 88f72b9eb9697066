"""The gradient of the gated product as one GEMM whose epilogue is the backward of SwiGLU.

ds = dout w3 stays in the accumulator: what is written is what the weight gradients need, da, db and
the gated product s again, and the column sums of da and db for the bias gradients. The epilogue
takes the accumulator 64 columns at a time at most: more at once spill registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import launch_config
from kernels.triton_impl.column_sum import column_sum
from kernels.triton_impl.gemm_tiles import (
    check_operands,
    fits_tma,
    grouped_tile,
    load_tile,
    operand,
)

INTERPRET = triton.knobs.runtime.interpret


def gate_gemm_backward(
    dout: Tensor,
    w3: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    out_a: Tensor | None = None,
    out_b: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Backward of s = silu(a) * b followed by the GEMM with w3.

    dout: [M, D], M >= 1. w3: [D, F]. a, b: [M, F] as the forward rounded them; not written. All
    bfloat16 or all float16.
    out_a, out_b: contiguous [M, F] to write da and db to; may be a and b, which are then lost.
    Returns (da, db, s, sum_a, sum_b): da, db, s [M, F] in the weights' dtype; sum_a, sum_b [F] in
    float32, the column sums of da and db as rounded. ds = dout w3 is rounded to the weights' dtype,
    as separate ops would; everything after it is float32, rounded once. The sums are added up in an
    order that depends on M and on the launch configuration only.

    Raises ValueError for other dtypes, and for an out_a or out_b that cannot take the result.
    """
    check_operands("the fused gate GEMM", dout=dout, w3=w3, a=a, b=b)
    dout, w3, a, b = dout.contiguous(), w3.contiguous(), a.contiguous(), b.contiguous()
    rows, width = dout.shape
    hidden = w3.shape[1]
    da, db = _output("out_a", out_a, a), _output("out_b", out_b, b)
    gated = torch.empty_like(a)
    config = launch_config("gate_gemm", rows, dout, D=width, F=hidden)
    block_m, block_n, block_k = (config.constants[f"BLOCK_{axis}"] for axis in "MNK")
    use_tma = fits_tma(dout, w3)
    row_blocks = triton.cdiv(rows, block_m)
    partials = torch.empty(row_blocks, 2, hidden, dtype=torch.float32, device=dout.device)
    _gate_gemm[(row_blocks * triton.cdiv(hidden, block_n),)](
        operand(dout, (block_m, block_k), use_tma),
        operand(w3, (block_k, block_n), use_tma),
        a,
        b,
        da,
        db,
        gated,
        partials,
        rows,
        D=width,
        F=hidden,
        USE_TMA=use_tma,
        INTERPRET=INTERPRET,
        **config.options,
    )
    sums = column_sum(partials.view(row_blocks, 2 * hidden)).view(2, hidden)
    return da, db, gated, sums[0], sums[1]


def _output(name: str, given: Tensor | None, like: Tensor) -> Tensor:
    """The tensor to write to: the one given, if it can take a contiguous result like `like`."""
    if given is None:
        return torch.empty_like(like)
    if given.shape != like.shape or given.dtype != like.dtype or not given.is_contiguous():
        raise ValueError(
            f"{name} is {given.dtype} {tuple(given.shape)} with strides {given.stride()}; "
            f"pass a contiguous {like.dtype} {tuple(like.shape)}"
        )
    return given


@triton.jit(do_not_specialize=["M"])
def _gate_gemm(
    dout,
    w3,
    a,
    b,
    da,
    db,
    gated,
    partials,
    M,
    D: tl.constexpr,
    F: tl.constexpr,
    USE_TMA: tl.constexpr,
    INTERPRET: tl.constexpr,  # there the dot of bf16 operands is garbage: they are upcast
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One [BLOCK_M, BLOCK_N] tile of da, db and s, and its rows' share of the column sums."""
    row_block, column_block = grouped_tile(M, F, BLOCK_M, BLOCK_N, GROUP_M)
    row, column = row_block * BLOCK_M, column_block * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, D, BLOCK_K):
        x = load_tile(dout, row, k, M, D, BLOCK_M, BLOCK_K, USE_TMA, INTERPRET)
        w = load_tile(w3, k, column, D, F, BLOCK_K, BLOCK_N, USE_TMA, INTERPRET)
        acc = tl.dot(x, w, acc)

    sums = partials + row_block.to(tl.int64) * 2 * F
    if BLOCK_N > 128:
        HALF: tl.constexpr = BLOCK_N // 2
        low, high = _halves(acc)
        _epilogue(low, a, b, da, db, gated, sums, row, column, M, F, BLOCK_M, HALF)
        _epilogue(high, a, b, da, db, gated, sums, row, column + HALF, M, F, BLOCK_M, HALF)
    else:
        _epilogue(acc, a, b, da, db, gated, sums, row, column, M, F, BLOCK_M, BLOCK_N)


@triton.jit
def _halves(acc):
    """The left and the right half of acc's columns."""
    return tl.split(tl.permute(tl.reshape(acc, (acc.shape[0], 2, acc.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _epilogue(
    acc,
    a,
    b,
    da,
    db,
    gated,
    sums,
    row,
    column,
    M,
    F: tl.constexpr,
    BLOCK_M: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The backward of SwiGLU for acc [BLOCK_M, COLUMNS], ds at (row, column), half by half."""
    HALF: tl.constexpr = COLUMNS // 2
    low, high = _halves(acc)
    _swiglu_backward(low, a, b, da, db, gated, sums, row, column, M, F, BLOCK_M, HALF)
    _swiglu_backward(high, a, b, da, db, gated, sums, row, column + HALF, M, F, BLOCK_M, HALF)


@triton.jit
def _swiglu_backward(
    acc,
    a,
    b,
    da,
    db,
    gated,
    sums,
    row,
    column,
    M,
    F: tl.constexpr,
    BLOCK_M: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write da, db, s and the column sums of one tile of ds, [BLOCK_M, COLUMNS]."""
    r = row + tl.arange(0, BLOCK_M)
    c = column + tl.arange(0, COLUMNS)
    offsets = r.to(tl.int64)[:, None] * F + c[None, :]
    mask = (r < M)[:, None] & (c < F)[None, :]
    dtype = da.dtype.element_ty
    ds = acc.to(dtype).to(tl.float32)
    gate = tl.load(a + offsets, mask, other=0.0).to(tl.float32)
    linear = tl.load(b + offsets, mask, other=0.0).to(tl.float32)
    sig = tl.sigmoid(gate)
    tl.store(gated + offsets, (gate * sig * linear).to(dtype), mask)
    grad_b = (ds * gate * sig).to(dtype)
    tl.store(db + offsets, grad_b, mask)
    grad_a = (ds * linear * sig * (1 + gate * (1 - sig))).to(dtype)
    tl.store(da + offsets, grad_a, mask)
    # Rows beyond M add nothing: their ds, a and b are zeros.
    tl.store(sums + c, tl.sum(grad_a.to(tl.float32), 0), c < F)
    tl.store(sums + F + c, tl.sum(grad_b.to(tl.float32), 0), c < F)
