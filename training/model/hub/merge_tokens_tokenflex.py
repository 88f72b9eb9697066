"""Method `merge`: the patches that are most alike are averaged until exactly enough are left."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .token_method_tokenflex import TokenMethod, by_side


class MergeProjector(TokenMethod):
    """Bipartite soft matching to exactly n * n tokens.

    As in ToMe (arXiv 2210.09461), which FastVGGT (arXiv 2509.02560) takes up: every second token
    finds its most similar one among the others, and the most similar pairs are merged, at most
    half of the tokens a round. A token is the mean of all patches that went into it; tokens are
    in the order of the patch that took in the others. See `merged_groups`.
    """

    def tokens(self, patches: Tensor, sides: list[int]) -> Tensor:
        """The means of the groups, [sum of n^2, C], in float32 or wider."""
        wide = torch.promote_types(patches.dtype, torch.float32)
        return by_side(self._merge, sides, patches.to(wide))

    def _merge(self, n: int, patches: Tensor) -> Tensor:
        with torch.no_grad():
            groups = merged_groups(patches, n * n)
        return group_means(patches, groups, n * n)


def merged_groups(patches: Tensor, count: int) -> Tensor:
    """To which of the `count` tokens each of the patches [t, P, C] belongs: int64 [t, P]."""
    size = patches.shape[1]
    groups = torch.arange(size, device=patches.device).expand(len(patches), -1)
    tokens = patches
    while size > count:
        fewer = min(size - count, size // 2)
        groups = merge_once(tokens, fewer).gather(1, groups)
        size -= fewer
        if size > count:
            tokens = group_means(patches, groups, size)
    return groups


def merge_once(tokens: Tensor, fewer: int) -> Tensor:
    """The new number of each of the tokens [t, s, C] after `fewer` were merged: int64 [t, s]."""
    unit = F.normalize(tokens, dim=2)
    similarity, partner = (unit[:, ::2] @ unit[:, 1::2].mT).max(2)
    merged = similarity.sort(dim=1, descending=True, stable=True).indices[:, :fewer]
    number = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
    into = number.clone()
    into[:, ::2] = number[:, ::2].scatter(1, merged, 2 * partner.gather(1, merged) + 1)
    left = torch.eq(into, number).cumsum(1) - 1
    return left.gather(1, into)


def group_means(patches: Tensor, groups: Tensor, count: int) -> Tensor:
    """[t, count, C]: the mean of each group's patches [t, P, C].

    A product, not additions at places: on a GPU the order of those, and so their sum, varies.
    """
    number = torch.arange(count, device=patches.device)[:, None]
    members = torch.eq(groups[:, None], number).to(patches.dtype)
    return members @ patches / members.sum(2, keepdim=True)
