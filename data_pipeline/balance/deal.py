"""Dealing samples to packs: longest processing time first, many packs at once."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Caps = tuple[int | None, ...]
"""What a pack can hold of tokens, FLOPs and tiles; None where nothing caps it."""

_MEAN_BITS = 20  # a mean pack's load is 2^20: fine against a sample, small enough for `order_by`
_SMALLEST_ROUND = 16  # a round deals to at least 1 / this many of the packs


@dataclass
class Packs:
    """K packs of S samples with D quantities each, and who is where.

    values: int64 [D, S+1], of every sample and, last, of the empty place S: zeros.
    items: int64 [K, M], the samples of each pack from the left; S where a place is empty. The last
        column is empty.
    count: int64 [K], samples of each pack.
    loads: int64 [D, K], sums of the values in each pack.
    """

    values: Ints
    items: Ints
    count: Ints
    loads: Ints

    @property
    def num_samples(self) -> int:
        return self.values.shape[1] - 1

    def widen(self) -> None:
        """Keep an empty column at the right, so that any pack can take one more sample."""
        if self.count.max() + 1 >= self.items.shape[1]:
            shape = (len(self.items), self.items.shape[1])
            self.items = np.concatenate([self.items, np.full(shape, self.num_samples)], axis=1)

    def set_place(self, pack: Ints, place: Ints, item: Ints) -> None:
        """Put samples (or S: nothing) at places of distinct packs; loads and counts follow."""
        before = self.items[pack, place]
        self.items[pack, place] = item
        for value, load in zip(self.values, self.loads, strict=True):
            load[pack] += value[item] - value[before]
        empty = self.num_samples
        self.count[pack] += (item != empty).astype(np.int64) - (before != empty)
        gone = (item == empty) & (before != empty)
        pack, place = pack[gone], place[gone]
        last = self.count[pack]  # closes the gap with the pack's last sample
        self.items[pack, place] = self.items[pack, last]
        self.items[pack, last] = empty
        self.widen()

    def fits(self, caps: Caps, pack: Ints, comes: Ints, goes: Ints) -> npt.NDArray[np.bool_]:
        """Whether packs stay within the caps when one sample comes and one goes; [N]."""
        fits = np.ones(len(pack), dtype=bool)
        for value, load, cap in zip(self.values, self.loads, caps, strict=True):
            if cap is not None:
                fits &= load[pack] + value[comes] - value[goes] <= cap
        return fits

    def pack_of(self) -> Ints:
        """The pack of every sample, -1 where it is in none; int64 [S]."""
        pack = np.full(self.num_samples + 1, -1, dtype=np.int64)
        pack[self.items] = np.arange(len(self.items))[:, None]
        return pack[:-1]


def order_by(key: Ints) -> Ints:
    """Stable order of integers, ascending: several times as fast as numpy's argsort.

    Key and place share one integer, so that no ties are left: key * number of keys below 2^62.
    """
    bits = len(key).bit_length()
    return np.sort(key << bits | np.arange(len(key))) & (1 << bits) - 1


def deal(values: Ints, num_packs: int) -> Packs:
    """Deal samples to `num_packs` packs so that these get alike, without regard to any cap.

    Largest first, each to the pack with the least load, the load being the sum of the first two
    quantities, each relative to its mean over packs. Exactly that would be a step per sample; here
    one round serves all packs that the rule would take before it took one of them twice, and at
    least every sixteenth of the packs, which bounds the rounds.

    Args:
        values: int64 [D, S], D >= 2, none negative.
        num_packs: K > 0.
    """
    num_samples = values.shape[1]
    size = np.zeros(num_samples, dtype=np.int64)
    for quantity in values[:2]:
        total = int(quantity.sum())
        if total:
            # Rounded down to integers, whose sums do not depend on their order.
            size += (quantity * (num_packs * 2.0**_MEAN_BITS / total)).astype(np.int64)
    order = order_by(-size)
    size = size[order]
    packs = _empty(values, num_packs)
    load = np.zeros(num_packs, dtype=np.int64)
    done = 0
    while done < num_samples:
        number = min(num_packs, num_samples - done)
        pack = order_by(load)[:number]
        before = load[pack]
        after = before + size[done : done + number]
        again = before[1:] > np.minimum.accumulate(after)[:-1]
        fair = int(again.argmax()) + 1 if again.any() else number
        number = min(number, max(fair, num_packs // _SMALLEST_ROUND))
        pack, item = pack[:number], order[done : done + number]
        packs.items[pack, packs.count[pack]] = item
        packs.count[pack] += 1
        packs.widen()
        load[pack] = after[:number]
        done += number
    for quantity, loads in zip(packs.values, packs.loads, strict=True):
        loads[:] = quantity[packs.items].sum(axis=1)
    return packs


def _empty(values: Ints, num_packs: int) -> Packs:
    depth, num_samples = values.shape
    return Packs(
        values=np.concatenate([values, np.zeros((depth, 1), dtype=np.int64)], axis=1),
        items=np.full((num_packs, 8), num_samples),
        count=np.zeros(num_packs, dtype=np.int64),
        loads=np.zeros((depth, num_packs), dtype=np.int64),
    )
