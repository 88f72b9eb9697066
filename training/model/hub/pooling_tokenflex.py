"""Pooling of patch grids to n x n tokens, n given per tile, in plain PyTorch.

The trainer pools by other means (`kernels`); its tests hold both against each other.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def pool_patches(
    patches: Tensor, tile_sides: Sequence[int], grid: tuple[int, int], mode: str
) -> Tensor:
    """Pool tile i of patches [T, H*W, C] to tile_sides[i]^2 tokens: [sum of n^2, C], in tile order.

    Averages are taken in float32 or wider, which is also what is returned.

    grid: (H, W). mode: "adaptive" takes the windows of `adaptive_avg_pool2d`; "resize" up-samples
    bilinearly (align_corners) to the next multiple of n, then averages, as the released projector
    does.

    Raises ValueError for an unknown mode.
    """
    if mode not in _POOLS:
        raise ValueError(f"pool is {mode!r}; use one of {', '.join(_POOLS)}")
    wide = torch.promote_types(patches.dtype, torch.float32)
    maps = patches.to(wide).transpose(1, 2).unflatten(2, grid)  # [T, C, H, W]
    tokens: list[Tensor] = [maps.new_empty(0)] * len(tile_sides)
    for n in set(tile_sides):
        tiles = [tile for tile, side in enumerate(tile_sides) if side == n]
        pooled = _POOLS[mode](maps[tiles], n).flatten(2).transpose(1, 2)  # [tiles, n*n, C]
        for tile, rows in zip(tiles, pooled, strict=True):
            tokens[tile] = rows
    return torch.cat([patches.new_empty(0, patches.shape[2], dtype=wide), *tokens])


def pool_patches_in_graph(
    patches: Tensor, sides: Tensor, grid: tuple[int, int], mode: str, rows: int
) -> Tensor:
    """As `pool_patches` for sides [T] in a tensor, in shapes that do not depend on them: [rows, C].

    That is what a compiled graph can hold whole. Behind the tokens of the tiles come rows of no
    meaning; tokens that do not fit are left out. Sides out of range give no error.
    """
    wide = torch.promote_types(patches.dtype, torch.float32)
    maps = patches.to(wide).unflatten(1, grid)  # [T, H, W, C]
    largest = min(grid)
    sides = sides.to(patches.device).clamp(1, largest)
    down, across = (_AXES[mode](sides, size, largest, wide) for size in grid)
    pooled = torch.einsum("tih,thwc->tiwc", down, maps)
    pooled = torch.einsum("tjw,tiwc->tijc", across, pooled)
    counts = sides.square()
    ends = counts.cumsum(0)
    row = torch.arange(rows, device=patches.device)
    tile = torch.searchsorted(ends, row, right=True).clamp(max=len(sides) - 1)
    place = row - (ends - counts)[tile]
    line = (place // sides[tile]).clamp(max=largest - 1)
    return pooled[tile, line, place % sides[tile]]


def _adaptive_axis(sides: Tensor, size: int, largest: int, dtype: torch.dtype) -> Tensor:
    """[T, largest, size]: the weight of each of `size` patches in the windows of n, then zeros."""
    n, window = sides[:, None, None], torch.arange(largest, device=sides.device)[:, None]
    patch = torch.arange(size, device=sides.device)
    start, end = window * size // n, -(-(window + 1) * size // n)
    return ((patch >= start) & (patch < end)).to(dtype) / (end - start)


def _resize_axis(sides: Tensor, size: int, largest: int, dtype: torch.dtype) -> Tensor:
    """As `_adaptive_axis`, over points between the patches: the next multiple of n of them."""
    n, window = sides[:, None, None, None], torch.arange(largest, device=sides.device)
    each = -(-size // n)  # points in a window
    point = torch.arange(size, device=sides.device)[:, None]
    at = (window[:, None, None] * each + point).to(dtype) * (size - 1) / (each * n - 1).clamp(min=1)
    near = (1 - (at - torch.arange(size, device=sides.device)).abs()).clamp(min=0)
    inside = (point < each) & (window[:, None, None] < n)
    return (near * inside).sum(2) / each[..., 0]


def _adaptive(maps: Tensor, n: int) -> Tensor:
    """[T, C, H, W] -> [T, C, n, n]."""
    return F.adaptive_avg_pool2d(maps, n)


def _resize(maps: Tensor, n: int) -> Tensor:
    """[T, C, H, W] -> [T, C, n, n]."""
    height, width = (-(-side // n) * n for side in maps.shape[2:])
    if (height, width) != maps.shape[2:]:
        maps = F.interpolate(maps, (height, width), mode="bilinear", align_corners=True)
    return F.avg_pool2d(maps, (height // n, width // n))


_POOLS: dict[str, Callable[[Tensor, int], Tensor]] = {"adaptive": _adaptive, "resize": _resize}
_AXES: dict[str, Callable[[Tensor, int, int, torch.dtype], Tensor]] = {
    "adaptive": _adaptive_axis,
    "resize": _resize_axis,
}
POOL_MODES = tuple(_POOLS)
