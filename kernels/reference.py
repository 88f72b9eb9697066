"""The token-adaptive projector in plain PyTorch: runs anywhere, and is what a kernel must equal.

Tiles that share a side n are pooled together, the pooled rows are put back into tile order, and
LayerNorm and the gated MLP then see all rows at once. Shapes: T tiles, H x W patches, C channels, F
hidden, D output, M = sum of n^2 output rows.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.tables import POOL_MODES, pooling_table


def projector_reference(
    x: Tensor,
    tile_sides: Sequence[int] | Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    *,
    grid: tuple[int, int],
    pool: str = "adaptive",
    eps: float = 1e-5,
) -> Tensor:
    """Pool each tile to its own n x n tokens and project them.

    TokenFLEX (arXiv 2504.03154), section 3.

    pool -> LayerNorm(C) -> silu(x w1 + b1) * (x w2 + b2) -> w3 + b3. Pooling accumulates in float32
    (float64 for float64 input) and is rounded to the weights' dtype before the norm.

    x: [T, H*W, C], patches row by row. T may be 0: the result is then empty, but still part of the
    graph.
    tile_sides: one n per tile, on the host: a sequence of int or an integer CPU tensor [T].
    norm_weight, norm_bias: [C]. w1, w2: [F, C]. b1, b2: [F]. w3: [D, F]. b3: [D]. As
    `torch.nn.Linear` keeps them.
    grid: (H, W). pool: "adaptive" or "resize", see `kernels.tables`. eps: of the LayerNorm.
    Returns [M, D] in the weights' dtype, tile after tile in the order given, each tile row by row.

    Raises ValueError when shapes, dtypes, devices, sides, grid or pool mode do not fit.
    """
    sides = check_inputs(x, tile_sides, norm_weight, norm_bias, w1, b1, w2, b2, w3, b3, grid, pool)
    pooled = pool_tiles(x, sides, grid, pool).to(norm_weight.dtype)
    normed = F.layer_norm(pooled, (x.shape[2],), norm_weight, norm_bias, eps)
    gated = F.silu(F.linear(normed, w1, b1)) * F.linear(normed, w2, b2)
    return F.linear(gated, w3, b3)


def pool_tiles(x: Tensor, sides: Sequence[int], grid: tuple[int, int], pool: str) -> Tensor:
    """Pool tile i of x [T, H*W, C] to sides[i]^2 rows: [M, C] in tile order, float32 or wider."""
    if not sides:
        return x.flatten(0, 1)
    groups: dict[int, list[int]] = {}
    for tile, n in enumerate(sides):
        groups.setdefault(n, []).append(tile)
    if len(groups) == 1:
        return _pool_group(x, sides[0], grid, pool).flatten(0, 1)
    pooled = [
        _pool_group(x[torch.tensor(tiles).to(x.device, non_blocking=True)], n, grid, pool).flatten(
            0, 1
        )
        for n, tiles in groups.items()
    ]
    order = torch.from_numpy(_rows_in_tile_order(sides, groups))
    return torch.cat(pooled)[order.to(x.device, non_blocking=True)]


def _pool_group(x: Tensor, n: int, grid: tuple[int, int], pool: str) -> Tensor:
    """Pool every tile of x [T, H*W, C] to n x n: [T, n*n, C]."""
    height, width = grid
    tiles, _, channels = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    down = _device_table(n, height, pool, x.device, dtype)  # [n, H]
    across = _device_table(n, width, pool, x.device, dtype)  # [n, W]
    with torch.autocast(x.device.type, enabled=False):
        rows = down @ x.to(dtype).reshape(tiles, height, width * channels)  # [T, n, W*C]
        tokens = across @ rows.reshape(tiles, n, width, channels)  # [T, n, n, C]
    return tokens.reshape(tiles, n * n, channels)


@lru_cache(maxsize=1024)
def _device_table(n: int, size: int, pool: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """`pooling_table` on a device; copied there once, since each copy waits for the device."""
    with torch.inference_mode(False):  # training may use what inference has cached
        return torch.tensor(pooling_table(n, size, pool), device=device, dtype=dtype)


def _rows_in_tile_order(sides: Sequence[int], groups: dict[int, list[int]]) -> np.ndarray:
    """For each output row, where it lies when the groups are concatenated: int64 [M]."""
    counts = np.square(np.asarray(sides, dtype=np.int64))
    starts = np.empty_like(counts)  # of each tile, in the concatenated groups
    by_group = np.concatenate([np.asarray(tiles) for tiles in groups.values()])
    starts[by_group] = np.cumsum(counts[by_group]) - counts[by_group]
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(starts, counts) + within


def check_inputs(
    x: Tensor,
    tile_sides: Sequence[int] | Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    grid: tuple[int, int],
    pool: str,
) -> list[int]:
    """Return the sides as a list of int, or raise ValueError naming what does not fit."""
    if pool not in POOL_MODES:
        raise ValueError(f"pool is {pool!r}; use one of {', '.join(POOL_MODES)}")
    if x.ndim != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected [tiles, H*W, C]")
    height, width = grid
    if height < 1 or width < 1 or height * width != x.shape[1]:
        raise ValueError(
            f"grid {height} x {width} does not match the {x.shape[1]} patches of x "
            f"{tuple(x.shape)}; pass the (rows, columns) of patches, without class tokens"
        )
    hidden, channels = w1.shape[0], x.shape[2]
    expected = {
        "norm_weight": (norm_weight, (channels,)),
        "norm_bias": (norm_bias, (channels,)),
        "w1": (w1, (hidden, channels)),
        "b1": (b1, (hidden,)),
        "w2": (w2, (hidden, channels)),
        "b2": (b2, (hidden,)),
        "w3": (w3, (w3.shape[0], hidden)),
        "b3": (b3, (w3.shape[0],)),
    }
    if not x.is_floating_point():
        raise ValueError(f"x is {x.dtype}; expected a floating-point dtype: cast it first")
    for name, (weight, shape) in expected.items():
        if weight.shape != shape:
            raise ValueError(f"{name} has shape {tuple(weight.shape)}; expected {shape}")
        if weight.dtype != x.dtype or weight.device != x.device:
            raise ValueError(
                f"{name} is {weight.dtype} on {weight.device}, x is {x.dtype} on {x.device}; "
                "move and cast them to one dtype and device"
            )
    return _check_sides(tile_sides, x.shape[0])


def _check_sides(tile_sides: Sequence[int] | Tensor, tiles: int) -> list[int]:
    """The sides as a list of int; ValueError unless there is one whole number >= 1 per tile."""
    if isinstance(tile_sides, Tensor):
        if tile_sides.device.type != "cpu":
            raise ValueError(f"tile_sides is on {tile_sides.device}; pass a list or a CPU tensor")
        tile_sides = tile_sides.tolist()
    sides = list(tile_sides)
    if len(sides) != tiles:
        raise ValueError(
            f"tile_sides has {len(sides)} entries for {tiles} tiles; pass one side per tile"
        )
    for tile, n in enumerate(sides):
        if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1:
            raise ValueError(
                f"tile_sides[{tile}] is {n!r}; expected a whole number >= 1, "
                "the side n of the tile's n x n tokens"
            )
    return [int(n) for n in sides]
