"""Pooling of many tiles, each to its own n x n, in plain PyTorch: grouped by n, and the adjoint."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from kernels.tables import pooling_table


def pool_tiles(x: Tensor, sides: Sequence[int], grid: tuple[int, int], pool: str) -> Tensor:
    """Pool tile i of x [T, H*W, C] to sides[i]^2 rows: [M, C] in tile order, float32 or wider."""
    if not sides:
        return x.flatten(0, 1)
    groups = _tiles_by_side(sides)
    if len(groups) == 1:
        return _pool_group(x, sides[0], grid, pool).flatten(0, 1)
    pooled = [
        _pool_group(
            x[torch.tensor(tiles, device="cpu").to(x.device, non_blocking=True)], n, grid, pool
        ).flatten(0, 1)
        for n, tiles in groups.items()
    ]
    order = torch.from_numpy(_rows_in_tile_order(sides, groups))
    return torch.cat(pooled)[order.to(x.device, non_blocking=True)]


def unpool_tiles(rows: Tensor, sides: Sequence[int], grid: tuple[int, int], pool: str) -> Tensor:
    """The adjoint of `pool_tiles`: rows [M, C] back to patches [T, H*W, C], float32 or wider."""
    groups = _tiles_by_side(sides)
    if len(groups) == 1:
        return _unpool_group(rows, sides[0], grid, pool)
    by_group = torch.from_numpy(np.argsort(_rows_in_tile_order(sides, groups)))
    pieces = rows[by_group.to(rows.device, non_blocking=True)].split(
        [len(tiles) * n * n for n, tiles in groups.items()]
    )
    patches = [_unpool_group(piece, n, grid, pool) for n, piece in zip(groups, pieces, strict=True)]
    tiles = [tile for group in groups.values() for tile in group]
    order = torch.tensor(tiles, device="cpu").argsort()
    return torch.cat(patches)[order.to(rows.device, non_blocking=True)]


def _tiles_by_side(sides: Sequence[int]) -> dict[int, list[int]]:
    """n -> the tiles of that side, in order of first appearance."""
    groups: dict[int, list[int]] = {}
    for tile, n in enumerate(sides):
        groups.setdefault(n, []).append(tile)
    return groups


def _pool_group(x: Tensor, n: int, grid: tuple[int, int], pool: str) -> Tensor:
    """Pool every tile of x [T, H*W, C] to n x n: [T, n*n, C]."""
    height, width = grid
    tiles, _, channels = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    down = _device_table(n, height, pool, x.device, dtype)  # [n, H]
    across = _device_table(n, width, pool, x.device, dtype)  # [n, W]
    rows = down @ x.to(dtype).reshape(tiles, height, width * channels)  # [T, n, W*C]
    tokens = across @ rows.reshape(tiles, n, width, channels)  # [T, n, n, C]
    return tokens.reshape(tiles, n * n, channels)


def _unpool_group(rows: Tensor, n: int, grid: tuple[int, int], pool: str) -> Tensor:
    """The adjoint of `_pool_group`: rows [T*n*n, C] to [T, H*W, C]."""
    height, width = grid
    channels = rows.shape[1]
    dtype = torch.promote_types(rows.dtype, torch.float32)
    up = _device_table(n, height, pool, rows.device, dtype).T  # [H, n]
    back = _device_table(n, width, pool, rows.device, dtype).T  # [W, n]
    lines = up @ rows.to(dtype).reshape(-1, n, n * channels)  # [T, H, n*C]
    patches = back @ lines.reshape(-1, height, n, channels)  # [T, H, W, C]
    return patches.reshape(-1, height * width, channels)


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
