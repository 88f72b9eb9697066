"""Methods `query` and `pool_query`: learned queries that read the patches by cross-attention."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .pooling_tokenflex import pool_patches
from .token_method_tokenflex import TokenMethod, by_side, norm_rows

_HEAD_SIZE = 64


class AttentionWeights(NamedTuple):
    """Of a cross-attention, as `nn.MultiheadAttention` has them: in [3 C, C] of q, k, v, out."""

    in_weight: nn.Parameter
    in_bias: nn.Parameter
    out_weight: nn.Parameter
    out_bias: nn.Parameter


class QueryProjector(TokenMethod):
    """The first k of a learned sequence of queries attend to the patches and become the k tokens.

    As the Matryoshka query transformer does (MQT, arXiv 2405.19315), and FlexTok with its ordered
    registers (arXiv 2502.13967): a smaller count is a prefix of a larger one. One layer of
    attention over normalised patches, the keys with fixed sine positions of their places.
    """

    def make_parameters(self) -> None:
        """The queries, their norm and that of what they read, and the attention."""
        super().make_parameters()
        width = self.widths[0]
        self.queries = nn.Parameter(torch.empty(min(self.grid) ** 2, width))
        for name in ("query_norm", "key_norm"):
            setattr(self, f"{name}_weight", nn.Parameter(torch.empty(width)))
            setattr(self, f"{name}_bias", nn.Parameter(torch.empty(width)))
        self.make_attention("patch")

    def make_attention(self, name: str) -> None:
        """Add the parameters of an attention."""
        width = self.widths[0]
        shapes = ((3 * width, width), (3 * width,), (width, width), (width,))
        for part, shape in zip(AttentionWeights._fields, shapes, strict=True):
            setattr(self, f"{name}_{part}", nn.Parameter(torch.empty(shape)))

    def attention(self, name: str) -> AttentionWeights:
        """The parameters of an attention."""
        return AttentionWeights(*(getattr(self, f"{name}_{p}") for p in AttentionWeights._fields))

    def reset_parameters(self, std: float = 0.02) -> None:
        """Attention starts with scores of order one, or all queries would read the same."""
        super().reset_parameters(std)
        nn.init.normal_(self.queries, mean=0.0, std=1.0)
        for name, parameter in self.named_parameters():
            if name.endswith("norm_weight"):
                nn.init.ones_(parameter)
            elif name.endswith("_bias"):
                nn.init.zeros_(parameter)
            elif name.endswith(("in_weight", "out_weight")):
                nn.init.normal_(parameter, mean=0.0, std=self.widths[0] ** -0.5)

    def tokens(self, patches: Tensor, sides: list[int]) -> Tensor:
        """What each tile's queries read, [sum of n^2, C]."""
        weights = self.attention("patch")
        queries = self.normed(self.queries[: max(sides, default=1) ** 2], "query_norm")
        queries = in_projection(queries, weights, 0)
        keys, values = self.read(patches, weights)

        def attend(n: int, keys: Tensor, values: Tensor) -> Tensor:
            return attention(queries[: n * n].expand(len(keys), -1, -1), keys, values)

        read = by_side(attend, sides, keys, values)
        return out_projection(read, weights)

    def normed(self, rows: Tensor, name: str) -> Tensor:
        """LayerNorm with the parameters of this name."""
        weight, bias = getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")
        return norm_rows(rows, weight, bias, self.eps)

    def read(self, patches: Tensor, weights: AttentionWeights) -> tuple[Tensor, Tensor]:
        """Keys and values [T, H*W, C] of patches."""
        patches = self.normed(patches, "key_norm")
        keys = patches + sine_positions(self.grid, patches)
        return in_projection(keys, weights, 1), in_projection(patches, weights, 2)


class PoolQueryProjector(QueryProjector):
    """Pooled anchors keep the layout; queries that have read them look for what those leave out.

    After the public description of PARCEL (arXiv 2605.30126); the split and the depth are choices
    made here. Of a tile's k tokens the first m x m are anchors, m^2 at most k / 2. The others are
    the first k - m^2 of the queries: each adds to itself what it reads in the anchors, then reads
    the patches. A tile of one token has an anchor, too, which its query reads.
    """

    pools = True

    def make_parameters(self) -> None:
        """Also the attention to the anchors, and the norm of queries that have read them."""
        super().make_parameters()
        width = self.widths[0]
        self.read_norm_weight = nn.Parameter(torch.empty(width))
        self.read_norm_bias = nn.Parameter(torch.empty(width))
        self.make_attention("anchor")

    def tokens(self, patches: Tensor, sides: list[int]) -> Tensor:
        """Anchors, then what the queries read: [sum of n^2, C]."""
        return by_side(self._make, sides, patches, *self.read(patches, self.attention("patch")))

    def _make(self, n: int, patches: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        to_anchors, to_patches = self.attention("anchor"), self.attention("patch")
        side, count = split_side(n)
        anchors = self._pooled(patches, side)
        normed = self.normed(anchors, "key_norm")
        places = self._pooled(sine_positions(self.grid, patches)[None], side)
        queries = self.queries[:count]
        asked = in_projection(self.normed(queries, "query_norm"), to_anchors, 0)
        read = attention(
            asked.expand(len(patches), -1, -1),
            in_projection(normed + places, to_anchors, 1),
            in_projection(normed, to_anchors, 2),
        )
        queries = queries + out_projection(read, to_anchors)
        asked = in_projection(self.normed(queries, "read_norm"), to_patches, 0)
        found = out_projection(attention(asked, keys, values), to_patches)
        return torch.cat([anchors[:, : n * n - count], found], 1)

    def _pooled(self, patches: Tensor, side: int) -> Tensor:
        """[t, side^2, C]"""
        rows = pool_patches(patches, [side] * len(patches), self.grid, self.pool)
        return rows.unflatten(0, (len(patches), -1)).to(patches.dtype)


def split_side(n: int) -> tuple[int, int]:
    """(side of the anchors, number of queries) of a tile of n x n tokens; one query at least."""
    side = max(1, math.isqrt(n * n // 2))
    return side, max(1, n * n - side**2)


def in_projection(rows: Tensor, weights: AttentionWeights, part: int) -> Tensor:
    """The queries (part 0), keys (1) or values (2) of rows [..., C]."""
    return F.linear(rows, weights.in_weight.chunk(3)[part], weights.in_bias.chunk(3)[part])


def out_projection(rows: Tensor, weights: AttentionWeights) -> Tensor:
    """What an attention gives, of what its heads have read."""
    return F.linear(rows, weights.out_weight, weights.out_bias)


def attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Softmax attention of queries [t, k, C] over keys and values [t, P, C], head by head."""
    heads = head_count(queries.shape[-1])
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (queries, keys, values))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def head_count(width: int) -> int:
    """Heads of 64, or the next larger size that divides the width."""
    return next(n for n in range(max(1, width // _HEAD_SIZE), 0, -1) if width % n == 0)


def sine_positions(grid: tuple[int, int], like: Tensor) -> Tensor:
    """[H*W, C]: sines and cosines of a patch's row and column, a quarter of the width each.

    Wavelengths go from 2 pi to 10000 times that; what is left of the width is zero.
    """
    quarter = like.shape[-1] // 4
    wide = torch.promote_types(like.dtype, torch.float32)
    steps = torch.arange(quarter, device=like.device, dtype=wide)
    rates = torch.exp(steps * (-math.log(10_000) / max(quarter, 1)))
    rows, columns = (torch.arange(n, device=like.device, dtype=wide) for n in grid)
    down = (rows[:, None] * rates)[:, None].expand(-1, grid[1], -1)
    across = (columns[:, None] * rates)[None].expand(grid[0], -1, -1)
    waves = torch.cat([down.sin(), down.cos(), across.sin(), across.cos()], -1).flatten(0, 1)
    return F.pad(waves, (0, like.shape[-1] - 4 * quarter)).to(like.dtype)
