"""Sums of partial sums over rows, always in the same order: no atomics."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import launch_config


@triton.jit(do_not_specialize=["rows"])
def column_sum_kernel(
    parts,  # [rows, columns] float32
    total,  # [columns] float32
    rows,
    columns,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, rows, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        at = row.to(tl.int64)[:, None] * columns + column[None, :]
        sums += tl.load(parts + at, mask=mask, other=0.0)
    tl.store(total + column, tl.sum(sums, axis=0), mask=column < columns)


def column_sum(parts: Tensor) -> Tensor:
    """Sum of parts [R, N] float32 over R: [N]. The bits depend on R and the table, on no card."""
    rows, columns = parts.shape
    total = torch.empty(columns, dtype=torch.float32, device=parts.device)
    config = launch_config("column_sum", rows, parts, columns=columns)
    column_sum_kernel[(triton.cdiv(columns, config.constants["BLOCK_N"]),)](
        parts,
        total,
        rows,
        columns,
        **config.options,
    )
    return total
