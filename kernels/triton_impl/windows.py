"""What pooling and its gradient share: a weighted sum over a window of rows of C channels.

Windows come from tables in both modes. Computed from integers, as adaptive ones can be, they take
twice the instructions in backward and registers that some variants do not have.
"""

from typing import Any

import triton
import triton.language as tl

from kernels.tile_layout import COLUMNS, TileLayout


def pooling_arguments(layout: TileLayout) -> dict[str, Any]:
    """The kernels' arguments that say how the tiles are pooled."""
    spans = layout.spans
    return {
        "tiles": layout.table,
        "spans": spans.index,
        "weights": spans.weights,
        "COLUMNS": COLUMNS,
    }


@triton.jit
def window_sum(
    rows,  # of the tile, C channels each
    columns,  # rows in a line
    down,  # span of the lines: the first, how many, where their weights start
    across,  # span of the columns
    weights,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """float32 [BLOCK] and [TAIL]: the channels of one token of patches, or the other way."""
    top, height, down_at = tl.load(down), tl.load(down + 1), tl.load(down + 2)
    left, width, across_at = tl.load(across), tl.load(across + 1), tl.load(across + 2)
    stride = tl.full((), C, tl.int64)  # a single tile may have more than 2^31 elements
    corner = rows + (top * columns + left) * stride
    main = tl.zeros([BLOCK], tl.float32)
    tail = tl.zeros([TAIL if TAIL > 0 else 1], tl.float32)
    main_channels = tl.arange(0, BLOCK)
    tail_channels = BLOCK + tl.arange(0, TAIL if TAIL > 0 else 1)
    for i in range(height):
        line_weight = tl.load(weights + down_at + i)
        for j in range(0, width, WINDOW):
            # Unrolled, so that WINDOW loads are under way at once.
            for ahead in tl.static_range(WINDOW):
                inside = j + ahead < width
                weight = line_weight * tl.load(
                    weights + across_at + j + ahead, mask=inside, other=0.0
                )
                row = corner + (i * columns + j + ahead) * stride
                values = tl.load(row + main_channels, mask=inside, other=0.0)
                main += weight * values.to(tl.float32)
                if TAIL > 0:
                    mask = inside & (tail_channels < C)
                    values = tl.load(row + tail_channels, mask=mask, other=0.0)
                    tail += weight * values.to(tl.float32)
    return main, tail
