"""The methods by which a model can make tokens of patches. A new one: its file, a line here."""

import math

from .merge_tokens_tokenflex import MergeProjector
from .projector_tokenflex import TokenFlexProjector
from .query_tokens_tokenflex import PoolQueryProjector, QueryProjector
from .select_tokens_tokenflex import SelectProjector
from .token_method_tokenflex import TokenMethod
from .unshuffle_tokenflex import UnshuffleProjector

METHODS: dict[str, type[TokenMethod]] = {
    "pool": TokenFlexProjector,
    "unshuffle": UnshuffleProjector,
    "query": QueryProjector,
    "pool_query": PoolQueryProjector,
    "select": SelectProjector,
    "merge": MergeProjector,
}
DEFAULT_METHOD = "pool"


def check_method(method: str, pool: str, num_tokens: int | None, grid: tuple[int, int]) -> None:
    """Raise ValueError unless there is such a method, and what it is given is of use to it.

    The names in the messages are those of the model's config.
    """
    if method not in METHODS:
        raise ValueError(f"projector_method is {method!r}; use one of {', '.join(METHODS)}")
    kind = METHODS[method]
    if not kind.pools and pool != "adaptive":
        pooling = ", ".join(name for name, other in METHODS.items() if other.pools)
        raise ValueError(
            f"pool is {pool!r}, but the projector's method {method} does not pool; leave pool out, "
            f"or use {pooling}"
        )
    if not kind.fixed and num_tokens is not None:
        raise ValueError(
            f"projector_num_tokens is {num_tokens}, but the projector's method {method} makes any "
            "number of tokens; leave it out"
        )
    if not kind.fixed:
        return
    side = math.isqrt(num_tokens or 0)
    if num_tokens is None or side < 1 or side**2 != num_tokens or any(g % side for g in grid):
        fitting = [n * n for n in range(1, min(grid) + 1) if all(g % n == 0 for g in grid)]
        raise ValueError(
            f"projector_num_tokens is {num_tokens}, but the projector's method {method} makes one "
            f"number of tokens, a square whose side divides the {grid[0]} x {grid[1]} patches of a "
            f"tile; use one of {', '.join(map(str, fitting))}"
        )
