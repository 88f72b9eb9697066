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
POOL_MODES = tuple(_POOLS)
