"""How much a supervised token counts in the loss, by the number of them in its sample."""

from collections.abc import Callable
from typing import Annotated

from pydantic import AfterValidator

from data_pipeline.errors import InputError

LOSS_WEIGHTINGS: dict[str, Callable[[int], float]] = {
    "token": lambda n: 1.0,
    "sample": lambda n: 1 / n,
    "sqrt": lambda n: n**-0.5,
}
"""Name -> weight of each of a sample's n >= 1 supervised tokens."""


def _known(name: str) -> str:
    loss_weight(name)
    return name


LossWeighting = Annotated[str, AfterValidator(_known)]
"""A name in `LOSS_WEIGHTINGS`; in settings another one is an error."""


def loss_weight(name: str) -> Callable[[int], float]:
    """The weighting of this name; InputError, naming all, where there is none."""
    if name not in LOSS_WEIGHTINGS:
        raise InputError(
            f"loss weighting {name!r} is unknown; use one of {', '.join(LOSS_WEIGHTINGS)}"
        )
    return LOSS_WEIGHTINGS[name]
