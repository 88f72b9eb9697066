"""The token-adaptive projector, method `pool`: from a tile's patches to n x n tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .pooling_tokenflex import pool_patches, pool_patches_in_graph
from .token_method_tokenflex import TokenMethod, check_length, in_graph


class TokenFlexProjector(TokenMethod):
    """TokenFLEX (arXiv 2504.03154), section 3: pool to n x n, LayerNorm, SwiGLU, linear."""

    pools = True

    def forward(
        self, patches: Tensor, tile_sides: Sequence[int] | Tensor, rows: int | None = None
    ) -> Tensor:
        """As in `TokenMethod`, and in one graph with sides in a tensor.

        rows: then, how many rows are given back; see `pool_patches_in_graph`. None for as many as
        there could be. Sides out of range fail an assertion then.
        """
        if not in_graph(tile_sides):
            return super().forward(patches, tile_sides)
        return self.project(self._pool_in_graph(patches, tile_sides, rows).to(patches.dtype))

    def tokens(self, patches: Tensor, sides: list[int]) -> Tensor:
        """The windows' means, in float32 or wider."""
        return pool_patches(patches, sides, self.grid, self.pool)

    def _pool_in_graph(self, patches: Tensor, sides: Tensor, rows: int | None) -> Tensor:
        largest = min(self.grid)
        check_length(sides, len(patches))
        torch._assert_async(
            ((sides >= 1) & (sides <= largest)).all(), f"tile_sides must be from 1 to {largest}"
        )
        most = len(sides) * largest**2
        rows = most if rows is None else min(rows, most)
        return pool_patches_in_graph(patches, sides, self.grid, self.pool, rows)
