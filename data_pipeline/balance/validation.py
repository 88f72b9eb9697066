"""What `balance` accepts, and its values as integers."""

from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.errors import InputError

_COST_UNITS = 2.0**32  # of the largest cost


def check_budget(max_tokens: int, packs_per_step: int, max_tiles: int | None) -> None:
    """InputError if packs could hold nothing, or a step had none."""
    for name, least, value in (
        ("max_tokens", 1, max_tokens),
        ("packs_per_step", 1, packs_per_step),
        ("max_tiles", 0, max_tiles),
    ):
        if value is not None and value < least:
            raise InputError(f"{name} is {value}; give {least} or more")


def checked_values(
    tokens: npt.ArrayLike,
    tiles: npt.ArrayLike,
    cost: npt.ArrayLike,
    max_tokens: int,
    max_tiles: int | None,
) -> npt.NDArray[np.int64]:
    """Tokens, cost in integer units, and tiles: int64 [3, S].

    Integers, since sums of them do not depend on their order, and so not on the machine.
    """
    arrays = {"tokens": np.asarray(tokens), "tiles": np.asarray(tiles), "cost": np.asarray(cost)}
    shapes = {name: array.shape for name, array in arrays.items()}
    if len(set(shapes.values())) > 1 or arrays["tokens"].ndim != 1:
        raise InputError(f"tokens, tiles and cost must be [S] each, found the shapes {shapes}")
    if not arrays["tokens"].size:
        return np.zeros((3, 0), dtype=np.int64)
    for name, array in arrays.items():
        _check_numbers(name, array)
    for name, cap in (("tokens", max_tokens), ("tiles", max_tiles)):
        worst = int(arrays[name].argmax())
        if cap is not None and arrays[name][worst] > cap:
            raise InputError(
                f"sample {worst} has {arrays[name][worst]} {name}, more than max_{name}={cap}; "
                f"leave it out or raise max_{name}"
            )
    units = arrays["cost"] / (float(arrays["cost"].max()) or 1.0) * _COST_UNITS
    whole = (arrays["tokens"], units, arrays["tiles"])
    return np.stack([array.astype(np.int64) for array in whole])


def _check_numbers(name: str, array: npt.NDArray[Any]) -> None:
    kinds, expected = ("iuf", "numbers") if name == "cost" else ("iu", "whole numbers")
    if array.dtype.kind not in kinds:
        raise InputError(f"{name} must be {expected}, found dtype {array.dtype}")
    bad = ~(np.isfinite(array) & (array >= 0))
    if bad.any():
        place = int(bad.argmax())
        raise InputError(
            f"{name} must be finite and not negative, found {array[place]} at sample {place}"
        )
