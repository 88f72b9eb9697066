"""What each method of making tokens computes for the tiles of a pack; see `training.model.hub`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from training.model.hub import TokenFlexConfig
from training.model.hub.query_tokens_tokenflex import split_side


class Product(NamedTuple):
    """A product of so many weights with so many rows; whether the rows depend on the patches."""

    weights: float
    rows: float
    of_patches: bool = True


@dataclass(frozen=True)
class MethodWork:
    """What the tiles of a pack need.

    products: with weights. attention: width * pairs of a query and a key. sums: FLOPs of products
    of patches with what has no gradient. choice: FLOPs that decide what is summed.
    """

    products: tuple[Product, ...]
    attention: float = 0.0
    sums: float = 0.0
    choice: float = 0.0

    def flops(self, below: bool, trains: bool) -> tuple[float, float]:
        """Of the model, forward and backward, and what backward computes again.

        below: whether the patches need a gradient. trains: whether the weights do.
        """
        total = self.choice + self.sums * (1 + below)
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


def _pool_query(config: TokenFlexConfig, sides: Sequence[int]) -> MethodWork:
    width = config.vision_config.hidden_size
    square, patches = float(width) ** 2, config.patch_grid[0] * config.patch_grid[1]
    split = [split_side(n) for n in sides]
    queries, anchors = sum(count for _, count in split), sum(m * m for m, _ in split)
    products = (
        Product(square, sum(count for _, count in set(split)), of_patches=False),
        Product(3 * square, queries),
        Product(2 * square, anchors + len(sides) * patches),
        *_swiglu(config, sides),
    )
    pairs = sum(float(count) * (m * m + patches) for m, count in split)
    return MethodWork(products, width * pairs)


def _select(config: TokenFlexConfig, sides: Sequence[int]) -> MethodWork:
    width, patches = config.vision_config.hidden_size, config.patch_grid[0] * config.patch_grid[1]
    covered = sum(1 < n * n < patches for n in sides)
    return MethodWork(_swiglu(config, sides), choice=2.0 * covered * patches**2 * width)


def _merge(config: TokenFlexConfig, sides: Sequence[int]) -> MethodWork:
    width, patches = config.vision_config.hidden_size, config.patch_grid[0] * config.patch_grid[1]
    choice = 0.0
    for n in sides:
        size = patches
        while size > n * n:
            fewer = min(size - n * n, size // 2)
            choice += 2.0 * width * (size // 2) * (size - size // 2)
            size -= fewer
            choice += 2.0 * width * size * patches * (size > n * n)
    sums = 2.0 * width * _tokens(sides) * patches
    return MethodWork(_swiglu(config, sides), sums=sums, choice=choice)


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
    "pool_query": _pool_query,
    "select": _select,
    "merge": _merge,
}
