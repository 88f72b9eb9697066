"""The gradient of the patches: each patch gathers from the tokens it went to, without atomics."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import launch_config
from kernels.tile_layout import TileLayout
from kernels.triton_impl.row_blocks import row_blocks, store_row
from kernels.triton_impl.windows import pooling_arguments, window_sum


# How many patches the largest tile has must not compile the kernel anew.
@triton.jit(do_not_specialize=["most_patches"])
def pool_backward_kernel(
    grad,  # [M, C], of pooled
    tiles,  # [T, COLUMNS] of the layout
    spans,  # [R, 3] first entry, entries, first weight
    weights,
    grad_x,  # [P, C]
    most_patches,
    COLUMNS: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    WINDOW: tl.constexpr,
):
    tile = tiles + COLUMNS * (tl.program_id(0) // most_patches)
    within = tl.program_id(0) % most_patches
    height, width = tl.load(tile + 2), tl.load(tile + 3)
    if within >= height * width:
        return
    patch = tl.load(tile + 1) + within
    at = patch.to(tl.int64) * C
    h, w = tl.load(tile + 4), tl.load(tile + 5)
    main, tail = window_sum(
        grad + tl.load(tile).to(tl.int64) * C,
        w,
        spans + 3 * (tl.load(tile + 6) + h + within // width),
        spans + 3 * (tl.load(tile + 7) + w + within % width),
        weights,
        C,
        BLOCK,
        TAIL,
        WINDOW,
    )
    store_row(grad_x + at, main, 0, BLOCK, C)
    if TAIL > 0:
        store_row(grad_x + at, tail, BLOCK, TAIL, C)


def pool_backward(grad: Tensor, layout: TileLayout) -> Tensor:
    """The gradient of x [P, C] from that of pooled [M, C]."""
    channels = grad.shape[1]
    most = int((layout.shapes[:, 0] * layout.shapes[:, 1]).max())
    grad_x = torch.empty((layout.patches, channels), dtype=grad.dtype, device=grad.device)
    sizes = {"C": channels, "grid": layout.grid, "pool": layout.mode}
    config = launch_config("pool_backward", layout.rows, grad, **sizes)
    # As many programs per tile as the largest needs: those too many for a tile end at once.
    pool_backward_kernel[(len(layout.shapes) * most,)](
        grad.contiguous(),
        grad_x=grad_x,
        most_patches=most,
        **pooling_arguments(layout),
        **row_blocks(channels),
        **config.options,
    )
    return grad_x
