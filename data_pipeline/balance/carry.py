"""What a window of samples leaves over to the next one."""

import numpy as np

from data_pipeline.balance.deal import Ints

Columns = tuple[Ints, ...]
"""What is known of samples, an int64 [S] each."""


def after_carried(carried: Columns, fresh: Columns) -> Columns:
    """A window's samples: first what the one before left over, as `balance` expects it."""
    return tuple(np.concatenate(pair) for pair in zip(carried, fresh, strict=True))


def left_over(pack: Ints, samples: Columns) -> Columns:
    """The samples that no pack took, in the window's order, for the next one.

    pack: int64 [S], -1 for none.
    """
    left = np.flatnonzero(pack < 0)
    return tuple(column[left] for column in samples)
