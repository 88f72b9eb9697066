"""Packs swap samples of about the same length, so that no pack of a step is much slower.

Where packs hold two or three samples and are full, few exchanges of any two samples fit. Samples
next to each other in the order of lengths nearly always do, and differ in tiles, and so in FLOPs.
"""

import numpy as np
import numpy.typing as npt

from data_pipeline.balance.deal import Caps, Ints, Packs, order_by

Floats = npt.NDArray[np.float64]

_FARTHEST = 32  # places between two samples in the order of lengths; a pass for each distance
_STRIDE = 109  # of the distances: near and far take turns, and none comes twice, being prime
_WAIT = 0.01  # lost to waiting: packs are near enough
_CHECK_EVERY = 4  # passes, which have to lower what is lost by so much:
_WON = 0.05


def swap_alike(packs: Packs, caps: Caps, packs_per_step: int) -> None:
    """Level the FLOPs of packs in place, as long as steps would wait for their slowest pack.

    A pass looks at every two samples that are so many places apart, and makes the swaps that bring
    two packs nearest to each other, one per pack. Nothing leaves or enters the packs.
    """
    pack_of = packs.pack_of()
    item = order_by(packs.values[0][:-1])
    item = item[pack_of[item] >= 0]
    pack, flops = pack_of[item], packs.values[1][item].astype(np.float64)
    before = np.inf
    farthest = min(_FARTHEST, len(item) - 1)
    for number in range(farthest):
        if number % _CHECK_EVERY == 0:
            wait = _wait(packs.loads[1], packs_per_step)
            if wait < _WAIT or wait > (1 - _WON) * before:
                return
            before = wait
        distance = 1 + number * _STRIDE % farthest
        load = packs.loads[1].astype(np.float64)[pack]
        first = _best(packs, caps, item, pack, _won(flops, load, distance), distance)
        _swap(packs, item, pack, first, first + distance)


def _wait(loads: Ints, packs_per_step: int) -> float:
    """FLOPs of a step's heaviest pack above the mean, of it: about that of all heaviest packs."""
    number = max(len(loads) // packs_per_step, 1)
    heaviest = int(np.partition(loads, -number)[-number:].sum())
    total = int(loads.sum())
    return heaviest * len(loads) / (number * total) - 1 if total else 0.0


def _won(flops: Floats, load: Floats, distance: int) -> Floats:
    """Half of what the sum of squares of the packs' FLOPs falls by when samples swap; [N - d].

    Args:
        flops, load: of each sample, and of its pack; [N] whole numbers, below 2^53 and so exact.
    """
    moved = flops[:-distance] - flops[distance:]
    return moved * (load[:-distance] - load[distance:] - moved)


def _best(packs: Packs, caps: Caps, item: Ints, pack: Ints, won: Floats, distance: int) -> Ints:
    """Places i of the swaps i <-> i + distance that fit, and are the best of both their packs."""
    place = np.flatnonzero(won > 0)
    one, other = item[place], item[place + distance]
    left, right = pack[place], pack[place + distance]
    fits = packs.fits(caps, left, other, one) & packs.fits(caps, right, one, other)
    place = place[fits]
    place = place[np.argsort(-won[place], kind="stable")]
    left, right, rank = pack[place], pack[place + distance], np.arange(len(place))
    best = np.full(len(packs.items), len(place))
    np.minimum.at(best, left, rank)
    np.minimum.at(best, right, rank)
    return place[(best[left] == rank) & (best[right] == rank)]


def _swap(packs: Packs, item: Ints, pack: Ints, first: Ints, second: Ints) -> None:
    """Swap the samples at `first` and `second`, all of different packs; `pack` follows."""
    places = np.concatenate([first, second])
    of, goes = pack[places], item[places]
    comes = item[np.concatenate([second, first])]
    packs.set_place(of, (packs.items[of] == goes[:, None]).argmax(axis=1), comes)
    pack[places] = pack[np.concatenate([second, first])]
