"""The gradient of the patches: each patch gathers from the tokens it went to, without atomics."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import launch_config
from kernels.passes import Pooling
from kernels.tables import axis_tables
from kernels.triton_impl.row_blocks import row_blocks, store_row


@triton.jit(do_not_specialize_on_alignment=["first_rows", "tile_sides"])
def pool_backward_kernel(
    grad,  # [M, C], of pooled
    first_rows,  # [T]
    tile_sides,  # [T]
    up_index,  # [R, 3] start, length, first weight
    up_weights,
    back_index,  # [R, 3]
    back_weights,
    grad_x,  # [T, H*W, C]
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    WINDOW: tl.constexpr,
):
    patch = tl.program_id(0)
    tile = patch // (HEIGHT * WIDTH)
    line = patch // WIDTH % HEIGHT
    side = tl.load(tile_sides + tile).to(tl.int64)
    up = up_index + 3 * ((side - 1) * HEIGHT + line)
    back = back_index + 3 * ((side - 1) * WIDTH + patch % WIDTH)
    top, height, up_at = tl.load(up), tl.load(up + 1), tl.load(up + 2)
    left, width, back_at = tl.load(back), tl.load(back + 1), tl.load(back + 2)
    first = tl.load(first_rows + tile)
    corner = grad + (first + top * side + left) * C

    main = tl.zeros([BLOCK], tl.float32)
    tail = tl.zeros([TAIL if TAIL > 0 else 1], tl.float32)
    main_channels = tl.arange(0, BLOCK)
    tail_channels = BLOCK + tl.arange(0, TAIL if TAIL > 0 else 1)
    for i in range(height):
        up_weight = tl.load(up_weights + up_at + i)
        for j in range(0, width, WINDOW):
            for ahead in tl.static_range(WINDOW):
                inside = j + ahead < width
                weight = up_weight * tl.load(
                    back_weights + back_at + j + ahead, mask=inside, other=0.0
                )
                token = corner + (i * side + j + ahead) * C
                values = tl.load(token + main_channels, mask=inside, other=0.0)
                main += weight * values.to(tl.float32)
                if TAIL > 0:
                    mask = inside & (tail_channels < C)
                    values = tl.load(token + tail_channels, mask=mask, other=0.0)
                    tail += weight * values.to(tl.float32)
    at = patch.to(tl.int64) * C
    store_row(grad_x + at, main, 0, BLOCK, C)
    if TAIL > 0:
        store_row(grad_x + at, tail, BLOCK, TAIL, C)


def pool_backward(grad: Tensor, pooling: Pooling) -> Tensor:
    """The gradient of x [T, H*W, C] from that of pooled [M, C]."""
    layout, (height, width), channels = pooling.layout, pooling.grid, grad.shape[1]
    tables = axis_tables(max(layout.sides), pooling.grid, pooling.mode, grad.device)
    tiles, patches = len(layout.sides), height * width
    grad_x = torch.empty((tiles, patches, channels), dtype=grad.dtype, device=grad.device)
    sizes = {"C": channels, "grid": pooling.grid, "pool": pooling.mode}
    config = launch_config("pool_backward", layout.rows, grad, **sizes)
    pool_backward_kernel[(tiles * patches,)](
        grad.contiguous(),
        layout.first_rows,
        layout.tile_sides,
        tables.up.index,
        tables.up.weights,
        tables.back.index,
        tables.back.weights,
        grad_x,
        HEIGHT=height,
        WIDTH=width,
        **row_blocks(channels),
        **config.options,
    )
    return grad_x
