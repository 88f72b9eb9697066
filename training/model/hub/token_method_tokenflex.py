"""What a method of making tokens keeps to: from a tile's patches to n x n tokens, any n."""

from collections.abc import Callable, Sequence
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TokenMethod(nn.Module):
    """Turns each tile's patches into n x n tokens of the language model's width, n given per tile.

    A subclass says how patches become rows of the vision width (`tokens`); LayerNorm, SwiGLU and a
    linear layer, whose weights never see n, are common to all. All of them keep to this:

    - In: patches [T, H*W, C] and one side n per tile, known on the host. Out: [sum of n^2, D],
      tile after tile; n goes from 1 to the shorter side of the patch grid.
    - A tile's tokens depend on its own patches and n alone, not on the tiles beside it.
    - The same input gives the same tokens, and gradients reach the patches and all parameters.
    - Nothing asks the device for a value: what depends on n is known beforehand.
    - Whatever the sides, all parameters take part: under ZeRO-3 a rank that left some out would
      leave the others waiting. For the same reason they are this module's own, not those of
      modules inside it, whose forward could run more often on one rank than on another.

    vision_size: C. hidden_size: F. text_size: D. grid: (rows, columns) of patches. pool: see
    `pooling_tokenflex`. num_tokens: of every tile, for a method that can make no other number.
    """

    pools = False
    """Whether it reads `pool`."""
    fixed = False
    """Whether it makes one number of tokens only, `num_tokens`."""

    def __init__(
        self,
        vision_size: int,
        hidden_size: int,
        text_size: int,
        grid: tuple[int, int],
        pool: str = "adaptive",
        eps: float = 1e-5,
        num_tokens: int | None = None,
    ) -> None:
        super().__init__()
        # For printing: where the trainer shards the weights, their shapes are empty.
        self.widths = (vision_size, hidden_size, text_size)
        self.grid, self.pool, self.eps, self.num_tokens = grid, pool, eps, num_tokens
        self.make_parameters()
        self.reset_parameters()

    def make_parameters(self) -> None:
        """Add the parameters, without values."""
        vision_size, hidden_size, text_size = self.widths
        self.norm_weight = nn.Parameter(torch.empty(vision_size))
        self.norm_bias = nn.Parameter(torch.empty(vision_size))
        self.w1 = nn.Parameter(torch.empty(hidden_size, vision_size))
        self.b1 = nn.Parameter(torch.empty(hidden_size))
        self.w2 = nn.Parameter(torch.empty(hidden_size, vision_size))
        self.b2 = nn.Parameter(torch.empty(hidden_size))
        self.w3 = nn.Parameter(torch.empty(text_size, hidden_size))
        self.b3 = nn.Parameter(torch.empty(text_size))

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

        rows: for a method that compiles with sides in a tensor, how many rows are given back.

        Raises ValueError unless there is one side per tile, from 1 to the patch grid's.
        """
        sides = as_list(tile_sides)
        check_length(sides, len(patches))
        check_range(sides, self.grid)
        return self.project(self.tokens(patches, sides).to(patches.dtype))

    def tokens(self, patches: Tensor, sides: list[int]) -> Tensor:
        """patches [T, H*W, C], checked sides -> rows [sum of n^2, C], tile after tile."""
        raise NotImplementedError

    def project(self, rows: Tensor) -> Tensor:
        """Rows [sum of n^2, C] -> tokens [sum of n^2, D]."""
        dtype = rows.dtype
        rows = norm_rows(rows, self.norm_weight, self.norm_bias, self.eps)
        gate, value = F.linear(rows, self.w1, self.b1), F.linear(rows, self.w2, self.b2)
        wide = torch.promote_types(dtype, torch.float32)
        gated = (F.silu(gate.to(wide)) * value.to(wide)).to(dtype)
        return F.linear(gated, self.w3, self.b3)

    def extra_repr(self) -> str:
        """Widths, grid and what else it was given, for `print(model)`."""
        more = f", pool={self.pool!r}" * self.pools + f", num_tokens={self.num_tokens}" * self.fixed
        return f"{' -> '.join(map(str, self.widths))}, grid={self.grid}{more}"


def norm_rows(rows: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension, in float32 or wider, rounded once."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    normed = F.layer_norm(rows.to(wide), rows.shape[-1:], weight.to(wide), bias.to(wide), eps)
    return normed.to(rows.dtype)


def by_side(make: Callable[..., Tensor], sides: list[int], *inputs: Tensor) -> Tensor:
    """Run `make(n, *inputs of the tiles of side n)`, [t, n*n, C], once per n; rows in tile order.

    inputs: [T, ...] each. Tiles are taken apart and put together as views and copies, not by
    indices, which would have to be sent to the device.
    """
    if len(set(sides)) == 1:
        return make(sides[0], *inputs).flatten(0, 1)
    apart = [tensor.unbind(0) for tensor in inputs]
    rows = [inputs[0].new_empty(0, inputs[0].shape[-1])] * len(sides)
    for n in sorted(set(sides)):
        tiles = [tile for tile, side in enumerate(sides) if side == n]
        made = make(n, *(torch.stack([parts[tile] for tile in tiles]) for parts in apart))
        for tile, tokens in zip(tiles, made.unbind(0), strict=True):
            rows[tile] = tokens
    return torch.cat(rows) if rows else inputs[0].new_empty(0, inputs[0].shape[-1])


def in_graph(tile_sides: Sequence[int] | Tensor | None) -> TypeGuard[Tensor]:
    """Whether the sides stay in a tensor, since a compiled graph cannot ask for them."""
    return torch.compiler.is_compiling() and isinstance(tile_sides, Tensor)


def as_list(tile_sides: Sequence[int] | Tensor | None) -> list[int]:
    """The sides of tiles as whole numbers on the host."""
    values = tile_sides.tolist() if isinstance(tile_sides, Tensor) else list(tile_sides or ())
    return [int(n) for n in values]


def check_length(tile_sides: Sequence[int] | Tensor, tiles: int) -> None:
    """Raise ValueError unless there is one side per tile."""
    if len(tile_sides) != tiles:
        raise ValueError(
            f"tile_sides has {len(tile_sides)} entries for {tiles} tiles; give one side per tile"
        )


def check_range(tile_sides: Sequence[int], grid: tuple[int, int]) -> None:
    """Raise ValueError unless all sides are from 1 to the patch grid's."""
    largest = min(grid)
    for n in set(tile_sides):
        if not 1 <= n <= largest:
            raise ValueError(
                f"tile_sides has {n}; a tile has {grid[0]} x {grid[1]} patches, so give sides from "
                f"1 to {largest}"
            )
