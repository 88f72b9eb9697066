"""Pairs of packs exchange a sample each, many pairs at once, until packs are alike and fit.

A pair that differs by g (a vector: tokens, FLOPs, tiles) is level after an exchange of samples x
and y with x - y = g / 2; an empty place counts as a sample of nothing, so a sample can also move.
Of the x and y that a pass looks at, the two nearest to that are taken.
"""

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from data_pipeline.balance.deal import Caps, Ints, Packs, order_by

Floats = npt.NDArray[np.float32]

# One unit of distance, relative to a mean pack: tokens, FLOPs, tiles. The cap on tokens is 0.5 %
# above their mean; FLOPs have no cap, and the most loaded of 64 packs decides a step's time.
_TOLERANCE = (0.003, 0.007, 0.03)
# Directions along which packs are sorted, so that opposite extremes meet. Integers: cosines may
# differ in the last bit between machines.
_DIRECTIONS = ((1, 0, 0), (0, 1, 0), (1, 1, 0), (1, -1, 0), (1, 0, 1), (2, 1, 0), (1, -2, 0))
_ALL_PASSES = 16  # over all packs
_WORST_PASSES = 40  # over the worst eighth of them
_WORST = 8
_REPAIR_PASSES = 24
_TOUCH_UP_PASSES = 12
_STALE = 100  # a pass in which one pair in so many exchanges is hardly worth its time
_PAIRS_PER_SAMPLE = 4  # exchanges that a pass over all packs looks at
_OVER = np.float32(1e12)  # distance of an exchange that leaves a pack over a cap


class Exchange:
    """Levels packs in place.

    Args:
        packs: changed in place.
        caps: per quantity what a pack can hold, or None.
        seed: which places are looked at, and who meets whom where nothing else decides.
    """

    def __init__(self, packs: Packs, caps: Caps, seed: int) -> None:
        self._packs, self._caps, self._turn = packs, caps, seed << 16
        self._num_packs = len(packs.items)
        self._tolerance = list(_TOLERANCE[: len(caps)])
        self._set_scale()
        per_pack = packs.num_samples / self._num_packs
        places = round(math.sqrt(2 * _PAIRS_PER_SAMPLE * per_pack))
        self._places = min(max(places, 4), int(packs.count.max()) + 1)

    def level(self, capped: bool = False) -> None:
        """Bring packs near each other.

        Args:
            capped: never take a pack over a cap; without, caps are not looked at, which is faster
                and gets further if `repair` can set it right.
        """
        half = self._num_packs // 2
        if not half:
            return
        stale = 0
        for number in range(_ALL_PASSES):
            if number == _ALL_PASSES // 2:
                self._adapt_tolerance()
            order = self._sorted_along(_DIRECTIONS[number % len(_DIRECTIONS)])
            done = self._exchange(order[:half], order[::-1][:half], capped)
            stale += done <= half // _STALE
            if stale >= 4:
                break
        self._level_worst(_WORST_PASSES, capped)

    def _level_worst(self, passes: int, capped: bool) -> None:
        """Bring the packs that are farthest from the mean nearer to it."""
        worst = max(self._num_packs // _WORST, 1)
        stale = 0
        for _ in range(passes if self._num_packs > 1 else 0):
            order = _descending(self._distance())
            others = order[worst:]
            start = self._next(len(others) - worst + 1)
            done = self._exchange(order[:worst], others[start : start + worst], capped)
            stale += done <= worst // _STALE
            if stale >= 8:
                break

    def repair(self) -> int:
        """Exchange samples of packs over a cap with packs that have room.

        Returns:
            How many packs are still over a cap.
        """
        for number in range(_REPAIR_PASSES):
            excess = self._excess()
            over = int((excess > 0).sum())
            # Where many stay over at first, there are too few packs for these samples.
            if not over or self._num_packs < 2 or (number == 6 and over > self._num_packs // 5):
                return over
            order = _descending(excess)
            over = min(over, self._num_packs // 2)
            rest = order[over:]
            rest = rest[order_by(self._packs.loads[0][rest])]  # most room first
            start = self._next(min(len(rest) - over, 3 * over) + 1)
            self._exchange(order[:over], rest[start : start + over], capped=True, anyhow=True)
        return int((self._excess() > 0).sum())

    def touch_up(self) -> None:
        """Level the worst packs once more; a repair takes what fits, not what is nearest."""
        self._level_worst(_TOUCH_UP_PASSES, capped=True)

    def _exchange(self, left: Ints, right: Ints, capped: bool, anyhow: bool = False) -> int:
        """One exchange within each pair (left[i], right[i]), all packs distinct, int64 [N].

        Where it brings the two nearer to each other, or `anyhow`: wherever the caps allow it.
        """
        places = self._look(left), self._look(right)  # each [N, m]
        items = tuple(
            self._packs.items[pack[:, None], place]
            for pack, place in zip((left, right), places, strict=True)
        )
        after, before = self._distances(left, right, items, capped)
        best = after.argmin(axis=1)
        rows = np.arange(len(left))
        near = after[rows, best]
        rows = rows[(near < _OVER) & (anyhow | (near < before * np.float32(0.999)))]
        best_left, best_right = np.divmod(best[rows], self._places)
        left, right = left[rows], right[rows]
        left_place, right_place = places[0][rows, best_left], places[1][rows, best_right]
        left_item, right_item = items[0][rows, best_left], items[1][rows, best_right]
        if capped:
            fits = self._packs.fits(self._caps, left, right_item, left_item)
            fits &= self._packs.fits(self._caps, right, left_item, right_item)
            left, left_place, left_item = left[fits], left_place[fits], left_item[fits]
            right, right_place, right_item = right[fits], right_place[fits], right_item[fits]
        self._packs.set_place(left, left_place, right_item)
        self._packs.set_place(right, right_place, left_item)
        return len(left)

    def _distances(
        self, left: Ints, right: Ints, items: tuple[Ints, ...], capped: bool
    ) -> tuple[Floats, Floats]:
        """Squared distance of each pair of packs after each exchange, [N, m * m], and now, [N]."""
        after = np.zeros((1, 1, 1), np.float32)  # becomes [N, m, m]
        before = np.zeros(len(left), np.float32)
        for value, load, scale, cap in self._quantities():
            from_left, from_right = value[items[0]], value[items[1]]  # [N, m]
            gap = ((load[left] - load[right]) * (scale / 2)).astype(np.float32)
            moved = (from_left - gap[:, None])[:, :, None] - from_right[:, None, :]  # [N, m, m]
            if capped and cap is not None:
                # What may go left to right until right is full, and back until left is. Half a
                # token more: float32 rounds, and `fits` checks in integers.
                most = ((cap - load[right] + 0.5) * scale).astype(np.float32) - gap
                least = ((load[left] - cap - 0.5) * scale).astype(np.float32) - gap
                over = (moved > most[:, None, None]) | (moved < least[:, None, None])
                after = after + over.astype(np.float32) * _OVER
            moved *= moved
            moved += after
            after = moved
            before += gap * gap
        return after.reshape(len(left), -1), before

    def _quantities(self) -> Iterator[tuple[Floats, Ints, float, int | None]]:
        yield from zip(self._values, self._packs.loads, self._scale, self._caps, strict=True)

    def _look(self, pack: Ints) -> Ints:
        """Places of packs that a pass looks at, out of the taken ones and one empty; [N, m]."""
        places = (self._packs.count[pack][:, None] + 1).astype(np.int32)
        start = self._next(1 << 20)
        looked = np.arange(start, start + self._places, dtype=np.int32) % places  # 32 bits: faster
        return looked.astype(np.int64)

    def _next(self, below: int) -> int:
        """A number in 0 .. below - 1, another one in every call (splitmix64 of a counter)."""
        self._turn += 1
        state = self._turn * 0x9E3779B97F4A7C15 & (1 << 64) - 1
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1
        return (state ^ state >> 27) % below

    def _set_scale(self) -> None:
        totals = [int(load.sum()) for load in self._packs.loads]
        self._mean = [total // self._num_packs for total in totals]
        self._scale = [
            self._num_packs / (total * tolerance) if total else 0.0
            for total, tolerance in zip(totals, self._tolerance, strict=True)
        ]
        values = zip(self._packs.values, self._scale, strict=True)
        self._values = [(value * scale).astype(np.float32) for value, scale in values]

    def _adapt_tolerance(self) -> None:
        """Ask less of a quantity that stays uneven, so that the others are not given up for it.

        One sample of maximum length has more attention than many short ones ever have together.
        """
        for quantity, (load, mean) in enumerate(zip(self._packs.loads, self._mean, strict=True)):
            uneven = int(np.abs(load - mean).sum()) / max(int(load.sum()), 1)
            self._tolerance[quantity] = max(self._tolerance[quantity], uneven / 2)
        self._set_scale()

    def _sorted_along(self, direction: tuple[int, ...]) -> Ints:
        along = np.zeros(self._num_packs)
        for load, scale, weight in zip(self._packs.loads, self._scale, direction, strict=False):
            if weight:
                along += load * (scale * weight)
        return _descending(along)

    def _distance(self) -> npt.NDArray[np.float64]:
        """Squared distance of every pack from the mean one, in units of tolerance; [K]."""
        total = np.zeros(self._num_packs)
        for load, mean, scale in zip(self._packs.loads, self._mean, self._scale, strict=True):
            total += ((load - mean) * scale) ** 2
        return total

    def _excess(self) -> npt.NDArray[np.float64]:
        """How far every pack is over its caps, in units of tolerance; [K]."""
        total = np.zeros(self._num_packs)
        for load, scale, cap in zip(self._packs.loads, self._scale, self._caps, strict=True):
            if cap is not None:
                total += np.maximum(load - cap, 0) * scale
        return total


def _descending(units: npt.NDArray[np.float64]) -> Ints:
    """Order of numbers of units of tolerance, largest first, to 2^-16 of a unit."""
    return order_by((np.clip(units, -(2.0**22), 2.0**22) * -(2.0**16)).astype(np.int64))
