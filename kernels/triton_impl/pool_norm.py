"""Pooling and LayerNorm in one kernel: one program makes one output row, X is read once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import launch_config
from kernels.tile_layout import TileLayout
from kernels.triton_impl.row_blocks import (
    contiguous,
    load_row,
    row_blocks,
    row_statistics,
    store_row,
)
from kernels.triton_impl.windows import pooling_arguments, window_sum


@triton.jit
def pool_norm_kernel(
    x,  # [P, C]
    tiles,  # [T, COLUMNS] of the layout
    tile_of_row,  # [M]
    spans,  # [R, 3] first entry, entries, first weight
    weights,
    norm_weight,  # [C]
    norm_bias,  # [C]
    pooled,  # [M, C]
    normed,  # [M, C]
    mean,  # [M]
    rstd,  # [M]
    COLUMNS: tl.constexpr,
    EPS: tl.constexpr,
    KEEP_POOLED: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    WINDOW: tl.constexpr,
):
    row = tl.program_id(0)
    tile = tiles + COLUMNS * tl.load(tile_of_row + row)
    token, columns = row - tl.load(tile), tl.load(tile + 5)
    main, tail = window_sum(
        x + tl.load(tile + 1).to(tl.int64) * C,
        tl.load(tile + 3),
        spans + 3 * (tl.load(tile + 6) + token // columns),
        spans + 3 * (tl.load(tile + 7) + token % columns),
        weights,
        C,
        BLOCK,
        TAIL,
        WINDOW,
    )
    tail_channels = BLOCK + tl.arange(0, TAIL if TAIL > 0 else 1)

    # Rounded before the norm, as where pooling and norm are separate operations.
    element = x.dtype.element_ty
    main = main.to(element).to(tl.float32)
    tail = tail.to(element).to(tl.float32)
    at = row.to(tl.int64) * C
    row_mean, row_rstd = row_statistics(main, tail, tail_channels < C, EPS, C, TAIL)
    tl.store(mean + row, row_mean)
    tl.store(rstd + row, row_rstd)
    scaled = (main - row_mean) * row_rstd * load_row(norm_weight, 0, BLOCK, C)
    store_row(normed + at, scaled + load_row(norm_bias, 0, BLOCK, C), 0, BLOCK, C)
    if KEEP_POOLED:
        store_row(pooled + at, main, 0, BLOCK, C)
    if TAIL > 0:
        scaled = (tail - row_mean) * row_rstd * load_row(norm_weight, BLOCK, TAIL, C)
        store_row(normed + at, scaled + load_row(norm_bias, BLOCK, TAIL, C), BLOCK, TAIL, C)
        if KEEP_POOLED:
            store_row(pooled + at, tail, BLOCK, TAIL, C)


def pool_norm(
    x: Tensor,
    layout: TileLayout,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    keep_pooled: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pool x [P, C] and normalise: (pooled [M, C], normed [M, C], mean [M], rstd [M]).

    pooled is [0, C] unless `keep_pooled`. mean and rstd are float32.
    """
    channels = x.shape[1]
    x, norm_weight, norm_bias = contiguous(x, norm_weight, norm_bias)
    pooled = torch.empty(
        (layout.rows if keep_pooled else 0, channels), dtype=x.dtype, device=x.device
    )
    normed = torch.empty((layout.rows, channels), dtype=x.dtype, device=x.device)
    mean = torch.empty(layout.rows, dtype=torch.float32, device=x.device)
    rstd = torch.empty(layout.rows, dtype=torch.float32, device=x.device)
    sizes = {"C": channels, "grid": layout.grid, "pool": layout.mode}
    config = launch_config("pool_norm", layout.rows, x, **sizes)
    pool_norm_kernel[(layout.rows,)](
        x,
        tile_of_row=layout.tile_of_row,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        pooled=pooled,
        normed=normed,
        mean=mean,
        rstd=rstd,
        EPS=eps,
        KEEP_POOLED=keep_pooled,
        **pooling_arguments(layout),
        **row_blocks(channels),
        **config.options,
    )
    return pooled, normed, mean, rstd
