"""The token-adaptive projector as a module: its parameters, their start values, released names."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kernels import token_adaptive_projector

# Name in the released checkpoint, below `projector.mlp.` -> name here, below `projector.`; the
# shapes are the same.
RELEASED_NAMES = {
    "layernorm.weight": "norm_weight",
    "layernorm.bias": "norm_bias",
    "f1.weight": "w1",
    "f1.bias": "b1",
    "f2.weight": "w2",
    "f2.bias": "b2",
    "g.weight": "w3",
    "g.bias": "b3",
}


class TokenAdaptiveProjector(nn.Module):
    """Turns each tile's patches into n x n tokens of the language model's width, n given per tile.

    TokenFLEX (arXiv 2504.03154), section 3: pool to n x n, LayerNorm, SwiGLU, linear; the weights
    never see n. The parameters belong to this module, not to child Linears, because ZeRO-3 gathers
    only the parameters of the module whose forward runs, and the op needs all of them at once.

    vision_size: C. hidden_size: F. text_size: D. grid: (rows, columns) of patches. pool: see
    `kernels.tables`. How it runs, and not what it computes, are the attributes `backward_mode`,
    "save" or "recompute", and `impl`, "auto", "triton" or "torch": see `kernels`.
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
        # For printing: under ZeRO-3 the shapes of the weights are empty.
        self.widths = (vision_size, hidden_size, text_size)
        self.grid, self.pool, self.eps = grid, pool, eps
        self.backward_mode, self.impl = "save", "auto"
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

    def forward(self, patches: Tensor, tile_sides: Sequence[int] | Tensor) -> Tensor:
        """patches [T, H*W, C], one side n per tile -> [sum of n^2, D], tile after tile."""
        return token_adaptive_projector(
            patches,
            tile_sides,
            self.norm_weight,
            self.norm_bias,
            self.w1,
            self.b1,
            self.w2,
            self.b2,
            self.w3,
            self.b3,
            grid=self.grid,
            pool=self.pool,
            backward=self.backward_mode,
            impl=self.impl,
            eps=self.eps,
        )

    def extra_repr(self) -> str:
        """Widths, grid and pool mode, for `print(model)`."""
        return f"{' -> '.join(map(str, self.widths))}, grid={self.grid}, pool={self.pool!r}"
