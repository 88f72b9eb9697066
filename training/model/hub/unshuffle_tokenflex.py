"""Method `unshuffle`: the patches of a window side by side in one token, a fixed count per tile."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .token_method_tokenflex import TokenMethod, norm_rows


class UnshuffleProjector(TokenMethod):
    """InternVL's pixel-unshuffle and MLP (arXiv 2404.16821): LayerNorm, linear, GELU, linear.

    A token is the a x b patches of its window, one behind the other, so that the first layer's
    weights are of this window: `num_tokens`, a square whose side divides the grid, is all that can
    be made.
    """

    fixed = True

    def make_parameters(self) -> None:
        """Of InternVL's MLP; the hidden width is the language model's."""
        vision_size, _, text_size = self.widths
        height, width = self.grid
        self.side = math.isqrt(self.num_tokens or 0)
        inner = vision_size * (height // self.side) * (width // self.side)
        self.norm_weight = nn.Parameter(torch.empty(inner))
        self.norm_bias = nn.Parameter(torch.empty(inner))
        self.w1 = nn.Parameter(torch.empty(text_size, inner))
        self.b1 = nn.Parameter(torch.empty(text_size))
        self.w2 = nn.Parameter(torch.empty(text_size, text_size))
        self.b2 = nn.Parameter(torch.empty(text_size))

    def reset_parameters(self, std: float = 0.02) -> None:
        """As in `TokenMethod`."""
        nn.init.ones_(self.norm_weight)
        for bias in (self.norm_bias, self.b1, self.b2):
            nn.init.zeros_(bias)
        for weight in (self.w1, self.w2):
            nn.init.normal_(weight, mean=0.0, std=std)

    def tokens(self, patches: Tensor, sides: list[int]) -> Tensor:
        """Rows [sum of n^2, a*b*C]; ValueError for another count than the one."""
        if others := sorted({n * n for n in sides} - {self.side**2}):
            raise ValueError(
                f"num_image_tokens is {', '.join(map(str, others))}, but the method unshuffle of "
                f"this model makes {self.side**2} tokens of a tile and no other number; give "
                f"num_image_tokens={self.side**2}, or train another method"
            )
        height, width = self.grid
        rows, columns = height // self.side, width // self.side
        windows = patches.unflatten(1, (self.side, rows, self.side, columns)).transpose(2, 3)
        return windows.flatten(3).flatten(0, 2)

    def project(self, rows: Tensor) -> Tensor:
        """Rows [sum of n^2, a*b*C] -> tokens [sum of n^2, D]."""
        wide = torch.promote_types(rows.dtype, torch.float32)
        hidden = F.linear(
            norm_rows(rows, self.norm_weight, self.norm_bias, self.eps), self.w1, self.b1
        )
        return F.linear(F.gelu(hidden.to(wide)).to(rows.dtype), self.w2, self.b2)
