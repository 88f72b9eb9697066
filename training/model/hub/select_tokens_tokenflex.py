"""Method `select`: of a tile's patches exactly as many as tokens are asked for, as they are."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .token_method_tokenflex import TokenMethod, by_side


class SelectProjector(TokenMethod):
    """Half of the tokens by saliency, the others by coverage; all in the order of the grid.

    The two criteria of DUET-VLM (arXiv 2602.18846), SeGPruner (arXiv 2603.29437) and their like.
    Those read saliency off the attention of a pretrained tower; here it is how far a patch is from
    the mean of its tile, which any tower has. See `choose_patches`.
    """

    def tokens(self, patches: Tensor, sides: list[int]) -> Tensor:
        """The chosen patches, [sum of n^2, C]."""
        return by_side(self._select, sides, patches)

    def _select(self, n: int, patches: Tensor) -> Tensor:
        with torch.no_grad():
            chosen = choose_patches(patches, n * n, self.grid)
        return patches.gather(1, chosen[..., None].expand(-1, -1, patches.shape[2]))


def choose_patches(patches: Tensor, count: int, grid: tuple[int, int]) -> Tensor:
    """Which `count` of the patches [t, P, C] are taken, ascending: int64 [t, count].

    First those farthest from the tile's mean, half of the count rounded up. Then, one by one, the
    patch that is farthest from the nearest one taken: by (1 - cosine) / 2 of what the two are
    beside the mean, plus how far they are apart on the grid, in diagonals. Of equals the first.
    """
    wide = torch.promote_types(patches.dtype, torch.float32)
    apart = patches.to(wide) - patches.to(wide).mean(1, keepdim=True)
    order = apart.square().sum(2).sort(dim=1, descending=True, stable=True).indices
    salient, places = (count + 1) // 2, patches.shape[1]
    if count in (1, places):
        return order[:, :count].sort(1).values
    distances = patch_distances(apart, grid)
    chosen = [order[:, :salient]]
    nearest = distances.gather(1, chosen[0][..., None].expand(-1, -1, places)).amin(1)
    nearest = nearest.scatter(1, chosen[0], -1.0)  # taken
    for _ in range(count - salient):
        chosen.append(nearest.argmax(1, keepdim=True))
        beside = distances.gather(1, chosen[-1][..., None].expand(-1, -1, places))[:, 0]
        nearest = torch.minimum(nearest, beside).scatter(1, chosen[-1], -1.0)
    return torch.cat(chosen, 1).sort(1).values


def patch_distances(apart: Tensor, grid: tuple[int, int]) -> Tensor:
    """[t, P, P]: of patches [t, P, C], given as what they are beside the mean; from 0 to 2."""
    unit = F.normalize(apart, dim=2)
    rows = torch.arange(grid[0], device=apart.device, dtype=apart.dtype)
    columns = torch.arange(grid[1], device=apart.device, dtype=apart.dtype)
    down = rows[:, None].expand(grid).flatten()
    across = columns[None].expand(grid).flatten()
    square = (down[:, None] - down).square() + (across[:, None] - across).square()
    diagonal = max(1.0, math.hypot(grid[0] - 1, grid[1] - 1))
    return (1 - unit @ unit.mT) / 2 + square.sqrt() / diagonal
