"""Pooling of many tiles, each to its own h x w, in plain PyTorch: grouped by shape; the adjoint."""

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.tables import pooling_table
from kernels.tile_layout import Shape, TileLayout


def pool_tiles(x: Tensor, layout: TileLayout) -> Tensor:
    """Pool the tiles of x [P, C] to rows [M, C], both tile after tile, float32 or wider."""
    groups = layout.groups()
    if len(groups) < 2:
        return _pool_group(x, next(iter(groups)), layout.mode) if groups else x
    by_group = _places(layout, groups, 0).to(x.device, non_blocking=True)
    pieces = x[by_group].split([len(tiles) * s[0] * s[1] for s, tiles in groups.items()])
    pooled = [
        _pool_group(piece, shape, layout.mode) for shape, piece in zip(groups, pieces, strict=True)
    ]
    order = _places(layout, groups, 2).argsort()
    return torch.cat(pooled)[order.to(x.device, non_blocking=True)]


def unpool_tiles(rows: Tensor, layout: TileLayout) -> Tensor:
    """The adjoint of `pool_tiles`: rows [M, C] back to patches [P, C], float32 or wider."""
    groups = layout.groups()
    if len(groups) == 1:
        return _unpool_group(rows, next(iter(groups)), layout.mode)
    by_group = _places(layout, groups, 2).to(rows.device, non_blocking=True)
    pieces = rows[by_group].split([len(tiles) * s[2] * s[3] for s, tiles in groups.items()])
    patches = [
        _unpool_group(piece, shape, layout.mode)
        for shape, piece in zip(groups, pieces, strict=True)
    ]
    order = _places(layout, groups, 0).argsort()
    return torch.cat(patches)[order.to(rows.device, non_blocking=True)]


def _places(layout: TileLayout, groups: Mapping[Shape, npt.NDArray[np.int64]], side: int) -> Tensor:
    """Where the rows of the tiles lie that are taken group by group: int64 [P] or [M].

    side: 0 for patches, 2 for tokens, the place of their two sides in a shape.
    """
    counts = layout.shapes[:, side] * layout.shapes[:, side + 1]
    tiles = np.concatenate(list(groups.values()))
    starts, counts = (counts.cumsum() - counts)[tiles], counts[tiles]
    within = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
    return torch.from_numpy(np.repeat(starts, counts) + within)


def _pool_group(x: Tensor, shape: Shape, mode: str) -> Tensor:
    """Pool tiles of one shape, x [T*H*W, C], to [T*h*w, C]."""
    height, width, h, w = shape
    channels = x.shape[1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    down = _device_table(h, height, mode, x.device, dtype)  # [h, H]
    across = _device_table(w, width, mode, x.device, dtype)  # [w, W]
    rows = down @ x.to(dtype).reshape(-1, height, width * channels)  # [T, h, W*C]
    tokens = across @ rows.reshape(-1, h, width, channels)  # [T, h, w, C]
    return tokens.reshape(-1, channels)


def _unpool_group(rows: Tensor, shape: Shape, mode: str) -> Tensor:
    """The adjoint of `_pool_group`: rows [T*h*w, C] to [T*H*W, C]."""
    height, width, h, w = shape
    channels = rows.shape[1]
    dtype = torch.promote_types(rows.dtype, torch.float32)
    up = _device_table(h, height, mode, rows.device, dtype).T  # [H, h]
    back = _device_table(w, width, mode, rows.device, dtype).T  # [W, w]
    lines = up @ rows.to(dtype).reshape(-1, h, w * channels)  # [T, H, w*C]
    patches = back @ lines.reshape(-1, height, w, channels)  # [T, H, W, C]
    return patches.reshape(-1, channels)


@lru_cache(maxsize=4096)
def _device_table(n: int, size: int, mode: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """`pooling_table` on a device; copied there once, since each copy waits for the device."""
    with torch.inference_mode(False):  # training may use what inference has cached
        return torch.tensor(pooling_table(n, size, mode), device=device, dtype=dtype)
