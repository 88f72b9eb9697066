"""Packs swap samples of about the same length, so that no pack of a step is much slower.

Where packs hold two or three samples and are full, few exchanges of any two samples fit. Samples
next to each other in the order of lengths nearly always do, and differ in tiles, and so in FLOPs.
"""

import numpy as np

from data_pipeline.balance.deal import Caps, Ints, Packs, order_by

_FARTHEST = 32  # places between two samples in the order of lengths; a pass for each distance
_STRIDE = 13  # of the distances, so that near and far ones take turns
_WAIT = 0.005  # lost to waiting: packs are near enough
_CHECK_EVERY = 4  # passes, which have to lower what is lost by so much:
_WON = 0.05


def swap_alike(packs: Packs, caps: Caps, packs_per_step: int) -> None:
    """Level the FLOPs of packs in place, as long as steps would wait for their slowest pack.

    A pass looks at every two samples that are so many places apart, and makes the swaps that bring
    two packs nearest to each other, one per pack. Nothing leaves or enters the packs.
    """
    pack_of = packs.pack_of()
    order = order_by(packs.values[0][:-1])
    order = order[pack_of[order] >= 0]
    before = np.inf
    for number in range(min(_FARTHEST, len(order) - 1)):
        if number % _CHECK_EVERY == 0:
            wait = _wait(packs.loads[1], packs_per_step)
            if wait < _WAIT or wait > (1 - _WON) * before:
                return
            before = wait
        distance = 1 + number * _STRIDE % _FARTHEST
        _swap(packs, caps, pack_of, order[:-distance], order[distance:])


def _wait(loads: Ints, packs_per_step: int) -> float:
    """FLOPs of a step's heaviest pack above the mean, of it: about that of all heaviest packs."""
    number = max(len(loads) // packs_per_step, 1)
    heaviest = int(np.partition(loads, -number)[-number:].sum())
    total = int(loads.sum())
    return heaviest * len(loads) / (number * total) - 1 if total else 0.0


def _swap(packs: Packs, caps: Caps, pack_of: Ints, one: Ints, other: Ints) -> None:
    """Of the swaps one[i] <-> other[i], make those that are the best for both their packs."""
    flops, loads = packs.values[1], packs.loads[1]
    left, right = pack_of[one], pack_of[other]
    gap, moved = loads[left] - loads[right], flops[one] - flops[other]
    nearer = np.flatnonzero((np.abs(gap - 2 * moved) < np.abs(gap)) & (left != right))
    one, other, left, right = one[nearer], other[nearer], left[nearer], right[nearer]
    gap, moved = gap[nearer], moved[nearer]
    fits = packs.fits(caps, left, other, one) & packs.fits(caps, right, one, other)
    # What the sum of squares of the packs' FLOPs falls by, halved; no integers hold it.
    won = (moved * 1.0 * (gap - moved))[fits]
    fitting = np.flatnonzero(fits)[np.argsort(-won, kind="stable")]
    one, other, left, right = one[fitting], other[fitting], left[fitting], right[fitting]
    rank = np.arange(len(one))
    best = np.full(len(packs.items), len(one))
    np.minimum.at(best, left, rank)
    np.minimum.at(best, right, rank)
    made = np.flatnonzero((best[left] == rank) & (best[right] == rank))
    one, other, left, right = one[made], other[made], left[made], right[made]
    places = [
        (packs.items[pack] == item[:, None]).argmax(axis=1)
        for pack, item in ((left, one), (right, other))
    ]
    packs.set_place(left, places[0], other)
    packs.set_place(right, places[1], one)
    pack_of[one], pack_of[other] = right, left
