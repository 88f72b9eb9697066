"""What the fused GEMMs share: the order of their output tiles, tile loads, when TMA serves them.

An operand comes either as a TMA descriptor or as a pointer, and the kernels take both: descriptors
need sm_90 and rows that start on 16 bytes. On sm_80 Triton turns a descriptor into plain loads that
it does not pipeline.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import launch

TMA_BYTES = 16  # alignment of a descriptor's base and rows
DTYPES = (torch.bfloat16, torch.float16)


@triton.jit
def grouped_tile(
    rows,
    columns,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """This program's (row block, column block).

    GROUP_M row blocks sweep the columns together, so that what they share stays in the L2 cache.
    """
    row_blocks = tl.cdiv(rows, BLOCK_M)
    column_blocks = tl.cdiv(columns, BLOCK_N)
    pid = tl.program_id(0)
    first = pid // (GROUP_M * column_blocks) * GROUP_M
    size = tl.minimum(row_blocks - first, GROUP_M)
    within = pid % (GROUP_M * column_blocks)
    return first + within % size, within // size


@triton.jit
def load_tile(
    source,
    row,
    column,
    rows,
    COLUMNS: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
    USE_TMA: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The tile at (row, column) of source [rows, COLUMNS], zeros beyond its ends."""
    if USE_TMA:
        tile = source.load([row, column])
    else:
        r = row + tl.arange(0, TILE_R)
        c = column + tl.arange(0, TILE_C)
        mask = (r < rows)[:, None]
        if COLUMNS % TILE_C != 0:
            mask = mask & (c < COLUMNS)[None, :]
        tile = tl.load(source + r.to(tl.int64)[:, None] * COLUMNS + c[None, :], mask, other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


def fits_tma(*tensors: Tensor) -> bool:
    """Whether TMA can load all of these contiguous matrices on their device."""
    if int(launch.architecture(tensors[0].device).removeprefix("sm_")) < 90:
        return False
    return all(
        t.data_ptr() % TMA_BYTES == 0 and t.shape[1] * t.element_size() % TMA_BYTES == 0
        for t in tensors
    )


def operand(matrix: Tensor, block: tuple[int, int], use_tma: bool) -> Tensor | TensorDescriptor:
    """What to hand to `load_tile` for tiles of this shape."""
    return TensorDescriptor.from_tensor(matrix, list(block)) if use_tma else matrix


def check_operands(name: str, **tensors: Tensor) -> None:
    """ValueError unless all tensors have one dtype, of those that the fused GEMMs compute in."""
    dtypes = {key: tensor.dtype for key, tensor in tensors.items()}
    if len(set(dtypes.values())) > 1 or next(iter(dtypes.values())) not in DTYPES:
        found = ", ".join(f"{key} {dtype}" for key, dtype in dtypes.items())
        raise ValueError(
            f"{name} computes in bfloat16 or float16, one dtype for all; found {found}: "
            'cast them, or use gemm="cublas"'
        )
