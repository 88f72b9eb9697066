"""What each method of making tokens computes for the tiles of a pack; see `training.model.hub`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from training.model.hub import TokenFlexConfig


class Product(NamedTuple):
    """A product of so many weights with so many rows; whether the rows depend on the patches."""

    weights: float
    rows: float
    of_patches: bool = True


@dataclass(frozen=True)
class MethodWork:
    """products: with weights. attention: width * pairs of a query and a key."""

    products: tuple[Product, ...]
    attention: float = 0.0

    def flops(self, below: bool, trains: bool) -> tuple[float, float]:
        """Of the model, forward and backward, and what backward computes again.

        below: whether the patches need a gradient. trains: whether the weights do.
        """
        total = 0.0
        for weights, rows, of_patches in self.products:
            through = trains or (below and of_patches)  # norms lie before all products
            total += 2.0 * weights * rows * (1 + through + trains)
        backward = below or trains
        attention = 4.0 * self.attention * (1 + 2 * backward)
        return total + attention, 2.0 * self.attention * backward


def method_work(config: TokenFlexConfig, sides: Sequence[int]) -> MethodWork:
    """The work of the config's method on tiles of these sides."""
    return _WORK[config.projector_method](config, sides)


def gate_flops(config: TokenFlexConfig, sides: Sequence[int]) -> float:
    """Forward FLOPs of the two gates, which the op of `pool` may compute again for backward."""
    width = config.vision_config.hidden_size
    return 4.0 * _tokens(sides) * config.projector_hidden_ratio * width**2


def _pool(config: TokenFlexConfig, sides: Sequence[int]) -> MethodWork:
    return MethodWork(_swiglu(config, sides))


def _unshuffle(config: TokenFlexConfig, sides: Sequence[int]) -> MethodWork:
    text, side = config.text_config.hidden_size, config.smallest_side
    height, width = config.patch_grid
    inner = config.vision_config.hidden_size * (height // side) * (width // side)
    rows = _tokens(sides)
    return MethodWork((Product(inner * text, rows), Product(text**2, rows)))


def _query(config: TokenFlexConfig, sides: Sequence[int]) -> MethodWork:
    square = float(config.vision_config.hidden_size) ** 2
    patches = config.patch_grid[0] * config.patch_grid[1]
    products = (
        Product(square, max(sides) ** 2, of_patches=False),
        Product(2 * square, len(sides) * patches),
        Product(square, _tokens(sides)),
        *_swiglu(config, sides),
    )
    pairs = float(_tokens(sides)) * patches
    return MethodWork(products, config.vision_config.hidden_size * pairs)


def _swiglu(config: TokenFlexConfig, sides: Sequence[int]) -> tuple[Product, ...]:
    width, text = config.vision_config.hidden_size, config.text_config.hidden_size
    inner, rows = config.projector_hidden_ratio * width, _tokens(sides)
    return (Product(2 * inner * width, rows), Product(inner * text, rows))


def _tokens(sides: Sequence[int]) -> int:
    return sum(n * n for n in sides)


_WORK: dict[str, Callable[[TokenFlexConfig, Sequence[int]], MethodWork]] = {
    "pool": _pool,
    "unshuffle": _unshuffle,
    "query": _query,
}
