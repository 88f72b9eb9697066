"""The token-adaptive projector: from a tile's patches to n x n tokens of the language model."""

from collections.abc import Sequence
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .pooling_tokenflex import pool_patches, pool_patches_in_graph


class TokenFlexProjector(nn.Module):
    """Turns each tile's patches into n x n tokens of the language model's width, n given per tile.

    TokenFLEX (arXiv 2504.03154), section 3: pool to n x n, LayerNorm, SwiGLU, linear; the weights
    never see n.

    vision_size: C. hidden_size: F. text_size: D. grid: (rows, columns) of patches. pool: see
    `pooling_tokenflex`.
    """

    def __init__(
        self,
        vision_size: int,
        hidden_size: int,
        text_size: int,
        grid: tuple[int, int],
        pool: str = "adaptive",
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        # For printing: where the trainer shards the weights, their shapes are empty.
        self.widths = (vision_size, hidden_size, text_size)
        self.grid, self.pool, self.eps = grid, pool, eps
        self.norm_weight = nn.Parameter(torch.empty(vision_size))
        self.norm_bias = nn.Parameter(torch.empty(vision_size))
        self.w1 = nn.Parameter(torch.empty(hidden_size, vision_size))
        self.b1 = nn.Parameter(torch.empty(hidden_size))
        self.w2 = nn.Parameter(torch.empty(hidden_size, vision_size))
        self.b2 = nn.Parameter(torch.empty(hidden_size))
        self.w3 = nn.Parameter(torch.empty(text_size, hidden_size))
        self.b3 = nn.Parameter(torch.empty(text_size))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Normal weights, zero biases, identity norm: as transformers starts Linear and norm."""
        nn.init.ones_(self.norm_weight)
        for bias in (self.norm_bias, self.b1, self.b2, self.b3):
            nn.init.zeros_(bias)
        for weight in (self.w1, self.w2, self.w3):
            nn.init.normal_(weight, mean=0.0, std=std)

    def forward(
        self, patches: Tensor, tile_sides: Sequence[int] | Tensor, rows: int | None = None
    ) -> Tensor:
        """patches [T, H*W, C], one side n per tile -> [sum of n^2, D], tile after tile.

        Between two matrix products it computes in float32 or wider and rounds once.

        rows: for sides in a tensor, compiled: how many rows are given back; see
            `pool_patches_in_graph`. None for as many as there could be.

        Raises ValueError unless there is one side per tile, from 1 to the patch grid's; compiled,
        sides in a tensor that are out of range fail an assertion.
        """
        if in_graph(tile_sides):
            pooled = self._pool_in_graph(patches, tile_sides, rows)
        else:
            sides = as_list(tile_sides)
            _check_length(sides, len(patches))
            _check_range(sides, self.grid)
            pooled = pool_patches(patches, sides, self.grid, self.pool)
        return self._project(pooled.to(patches.dtype))

    def _pool_in_graph(self, patches: Tensor, sides: Tensor, rows: int | None) -> Tensor:
        largest = min(self.grid)
        _check_length(sides, len(patches))
        torch._assert_async(
            ((sides >= 1) & (sides <= largest)).all(), f"tile_sides must be from 1 to {largest}"
        )
        most = len(sides) * largest**2
        rows = most if rows is None else min(rows, most)
        return pool_patches_in_graph(patches, sides, self.grid, self.pool, rows)

    def _project(self, rows: Tensor) -> Tensor:
        """Tokens [rows, C] -> [rows, D]."""
        dtype = rows.dtype
        wide = torch.promote_types(rows.dtype, torch.float32)
        weight, bias = self.norm_weight.to(wide), self.norm_bias.to(wide)
        rows = F.layer_norm(rows.to(wide), rows.shape[1:], weight, bias, self.eps)
        rows = rows.to(dtype)
        gate, value = F.linear(rows, self.w1, self.b1), F.linear(rows, self.w2, self.b2)
        gated = (F.silu(gate.to(wide)) * value.to(wide)).to(rows.dtype)
        return F.linear(gated, self.w3, self.b3)

    def extra_repr(self) -> str:
        """Widths, grid and pool mode, for `print(model)`."""
        return f"{' -> '.join(map(str, self.widths))}, grid={self.grid}, pool={self.pool!r}"


def in_graph(tile_sides: Sequence[int] | Tensor | None) -> TypeGuard[Tensor]:
    """Whether the sides stay in a tensor, since a compiled graph cannot ask for them."""
    return torch.compiler.is_compiling() and isinstance(tile_sides, Tensor)


def as_list(tile_sides: Sequence[int] | Tensor | None) -> list[int]:
    """The sides of tiles as whole numbers on the host."""
    values = tile_sides.tolist() if isinstance(tile_sides, Tensor) else list(tile_sides or ())
    return [int(n) for n in values]


def _check_length(tile_sides: Sequence[int] | Tensor, tiles: int) -> None:
    if len(tile_sides) != tiles:
        raise ValueError(
            f"tile_sides has {len(tile_sides)} entries for {tiles} tiles; give one side per tile"
        )


def _check_range(tile_sides: Sequence[int], grid: tuple[int, int]) -> None:
    largest = min(grid)
    for n in set(tile_sides):
        if not 1 <= n <= largest:
            raise ValueError(
                f"tile_sides has {n}; a tile has {grid[0]} x {grid[1]} patches, so give sides from "
                f"1 to {largest}"
            )
