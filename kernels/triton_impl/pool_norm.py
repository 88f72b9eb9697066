"""Pooling and LayerNorm in one kernel: one program makes one output row, X is read once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import launch_config
from kernels.passes import Pooling
from kernels.tables import axis_tables
from kernels.triton_impl.row_blocks import (
    contiguous,
    load_row,
    row_blocks,
    row_statistics,
    store_row,
)


# Where the parts of the layout's table start depends on T, which must not compile the kernel anew.
@triton.jit(do_not_specialize_on_alignment=["first_rows", "tile_sides", "tile_of_row"])
def pool_norm_kernel(
    x,  # [T, H*W, C]
    first_rows,  # [T]
    tile_sides,  # [T]
    tile_of_row,  # [M]
    down_index,  # [R, 3] start, length, first weight
    down_weights,
    across_index,  # [R, 3]
    across_weights,
    norm_weight,  # [C]
    norm_bias,  # [C]
    pooled,  # [M, C]
    normed,  # [M, C]
    mean,  # [M]
    rstd,  # [M]
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    EPS: tl.constexpr,
    KEEP_POOLED: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    WINDOW: tl.constexpr,
):
    row = tl.program_id(0)
    tile = tl.load(tile_of_row + row)
    side = tl.load(tile_sides + tile)
    token = row - tl.load(first_rows + tile)
    spans = side * (side - 1) // 2
    down = down_index + 3 * (spans + token // side)
    across = across_index + 3 * (spans + token % side)
    top, height, down_at = tl.load(down), tl.load(down + 1), tl.load(down + 2)
    left, width, across_at = tl.load(across), tl.load(across + 1), tl.load(across + 2)
    corner = x + (tile.to(tl.int64) * (HEIGHT * WIDTH) + top * WIDTH + left) * C

    stride = tl.full((), C, tl.int64)  # a single tile may have more than 2^31 elements
    main = tl.zeros([BLOCK], tl.float32)
    tail = tl.zeros([TAIL if TAIL > 0 else 1], tl.float32)
    main_channels = tl.arange(0, BLOCK)
    tail_channels = BLOCK + tl.arange(0, TAIL if TAIL > 0 else 1)
    for line in range(height):
        line_weight = tl.load(down_weights + down_at + line)
        for column in range(0, width, WINDOW):
            # Unrolled, so that WINDOW loads are under way at once.
            for ahead in tl.static_range(WINDOW):
                inside = column + ahead < width
                weight = line_weight * tl.load(
                    across_weights + across_at + column + ahead, mask=inside, other=0.0
                )
                patch = corner + (line * WIDTH + column + ahead) * stride
                values = tl.load(patch + main_channels, mask=inside, other=0.0)
                main += weight * values.to(tl.float32)
                if TAIL > 0:
                    mask = inside & (tail_channels < C)
                    values = tl.load(patch + tail_channels, mask=mask, other=0.0)
                    tail += weight * values.to(tl.float32)

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
    pooling: Pooling,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    keep_pooled: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pool x [T, H*W, C] and normalise: (pooled [M, C], normed [M, C], mean [M], rstd [M]).

    pooled is [0, C] unless `keep_pooled`. mean and rstd are float32.
    """
    layout, (height, width), channels = pooling.layout, pooling.grid, x.shape[2]
    x, norm_weight, norm_bias = contiguous(x, norm_weight, norm_bias)
    tables = axis_tables(max(layout.sides), pooling.grid, pooling.mode, x.device)
    pooled = torch.empty(
        (layout.rows if keep_pooled else 0, channels), dtype=x.dtype, device=x.device
    )
    normed = torch.empty((layout.rows, channels), dtype=x.dtype, device=x.device)
    mean = torch.empty(layout.rows, dtype=torch.float32, device=x.device)
    rstd = torch.empty(layout.rows, dtype=torch.float32, device=x.device)
    sizes = {"C": channels, "grid": pooling.grid, "pool": pooling.mode}
    config = launch_config("pool_norm", layout.rows, x, **sizes)
    pool_norm_kernel[(layout.rows,)](
        x,
        layout.first_rows,
        layout.tile_sides,
        layout.tile_of_row,
        tables.down.index,
        tables.down.weights,
        tables.across.index,
        tables.across.weights,
        norm_weight,
        norm_bias,
        pooled,
        normed,
        mean,
        rstd,
        HEIGHT=height,
        WIDTH=width,
        EPS=eps,
        KEEP_POOLED=keep_pooled,
        **row_blocks(channels),
        **config.options,
    )
    return pooled, normed, mean, rstd
