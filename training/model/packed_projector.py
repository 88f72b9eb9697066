"""The token-adaptive projector by the kernels' op, and the released names of its parameters."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from kernels import jagged_projector, token_adaptive_projector
from training.model.hub import METHODS, TokenFlexProjector, TokenMethod

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


class TokenAdaptiveProjector(TokenFlexProjector):
    """`TokenFlexProjector` with its forward in one op.

    The parameters belong to this module, not to child Linears, because ZeRO-3 gathers only the
    parameters of the module whose forward runs, and the op needs all of them at once.

    How it runs, and not what it computes, are the attributes `backward_mode`, "save" or
    "recompute", and `impl`, "auto", "triton" or "torch": see `kernels`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.backward_mode, self.impl = "save", "auto"
        self.adapters = nn.ModuleDict()

    def _matrix(self, name: str) -> Tensor:
        matrix: Tensor = getattr(self, name)
        return self.adapters[name](matrix) if name in self.adapters else matrix

    def forward(
        self, patches: Tensor, tile_sides: Sequence[int] | Tensor, rows: int | None = None
    ) -> Tensor:
        """patches [T, H*W, C], one side n per tile -> [sum of n^2, D], tile after tile.

        Or patches [P, C] of images of any grid, H, W, h, w of each -> [sum of h * w, D].
        rows: not needed, the op is in a compiled graph as it is.
        """
        native = patches.ndim == 2
        options: dict[str, Any] = {} if native else {"grid": self.grid}
        project: Any = jagged_projector if native else token_adaptive_projector
        tokens: Tensor = project(
            patches,
            tile_sides,
            self.norm_weight,
            self.norm_bias,
            self._matrix("w1"),
            self.b1,
            self._matrix("w2"),
            self.b2,
            self._matrix("w3"),
            self.b3,
            pool=self.pool,
            backward=self.backward_mode,
            impl=self.impl,
            eps=self.eps,
            **options,
        )
        return tokens


# Of the methods of making tokens this one is the kernels'; the others train as users load them.
TRAINED_METHODS: dict[str, type[TokenMethod]] = {**METHODS, "pool": TokenAdaptiveProjector}
