"""Joint packing and balancing: which samples share a pack, and which packs a step.

All packs of several steps are planned at once, so that every pack of every step gets about the
same tokens and the same FLOPs. Samples are dealt largest first and then exchanged between packs
until these are alike (`deal`, `exchange`); where samples are so large that this cannot fit, best
fit decreasing makes the packs and exchanges only level them (`fit`). Where steps would still wait
for their slowest pack, samples of like length are swapped (`swap`). Packs go to steps by chance:
they are alike in load, and sorting them would give steps of one kind of sample.

All decisions are made in integers or in single floating-point operations on arrays, whose results
are the same on every machine.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_pipeline.balance.deal import Caps, Ints, deal
from data_pipeline.balance.exchange import Exchange
from data_pipeline.balance.fit import best_fit_decreasing, evict, gather
from data_pipeline.balance.swap import swap_alike
from data_pipeline.balance.validation import check_budget, checked_values
from data_pipeline.draw import uniform_hash
from data_pipeline.errors import InputError

# Of a pack's tokens; the second where samples are so large that the first leaves too little room.
_FILLS = (0.995, 0.985)
_TILE_FILL = 0.97  # of a pack's tiles, which come in larger pieces
_LARGE = 0.33  # mean tokens of a sample, of a pack: above, dealing leaves too many packs over a cap
_FEW = 0.01  # share of packs that may give up a sample since they are over a cap
_MANY = 0.2  # share of packs over a cap that slightly more packs would not help
_SLACK = 1.01  # packs that may be spent so that exchanges have room


@dataclass(frozen=True)
class Packing:
    """A window's packs.

    pack: int64 [S], the pack of each sample, or -1: left over. Packs k * P .. (k + 1) * P - 1 are
        step k, with P packs per step.
    num_steps: steps planned.
    """

    pack: Ints
    num_steps: int


def balance(
    tokens: npt.ArrayLike,
    tiles: npt.ArrayLike,
    cost: npt.ArrayLike,
    max_tokens: int,
    packs_per_step: int,
    *,
    max_tiles: int | None = None,
    first: int = 0,
    last: bool = False,
    seed: int = 0,
) -> Packing:
    """Pack a window of samples, and balance its packs.

    What is left over is the end of the order, and a few samples that fit nowhere; together at most
    what the packs of one step hold. It must come first in the next window, whose `first` it is.
    There it is placed if that window plans a step (proved where best fit decreasing puts it into
    the packs of one step, as it does in every mix measured): no sample is left over twice in a
    row, unless the windows are smaller than a step.

    Args:
        tokens, tiles: whole numbers [S], in random order (what is left over comes from the end).
        cost: [S], what is balanced beside tokens, such as `CostModel.flops`; not negative.
        max_tokens: no pack gets more tokens.
        packs_per_step: P.
        max_tiles: no pack gets more tiles.
        first: so many samples at the beginning were left over by the window before.
        last: nothing may be left over; the final step has fewer samples, or none in some packs.
        seed: any integer; which packs make a step.

    Raises:
        InputError: arrays of different shapes, a negative value, a sample above a cap.
    """
    check_budget(max_tokens, packs_per_step, max_tiles)
    values = checked_values(tokens, tiles, cost, max_tokens, max_tiles)
    num_samples = values.shape[1]
    if not 0 <= first <= num_samples:
        raise InputError(f"first is {first}; expected 0 to {num_samples}, the number of samples")
    caps: Caps = (max_tokens, None, max_tiles) if max_tiles else (max_tokens, None)
    values = values[: len(caps)]
    pack = _whole_steps(values, caps, packs_per_step, first, seed)
    num_packs = int(pack.max(initial=-1)) + 1
    num_packs = -(-num_packs // packs_per_step) * packs_per_step
    pack = _shuffled(pack, num_packs, seed)
    rest = np.flatnonzero(pack < 0)
    if last and len(rest):
        more = _last_steps(values[:, rest], caps, packs_per_step, seed)
        pack[rest] = num_packs + more
        num_packs += -(-(int(more.max()) + 1) // packs_per_step) * packs_per_step
    return Packing(pack, num_packs // packs_per_step)


def _whole_steps(values: Ints, caps: Caps, per_step: int, first: int, seed: int) -> Ints:
    """Packs of as many full steps as there are; -1 for what is left, at most a step's worth."""
    for fill in _FILLS:
        pack = np.full(values.shape[1], -1, dtype=np.int64)
        num_packs, taken = _amount(values, caps, per_step, first, fill)
        if num_packs:
            if _too_large(values[0][:taken], caps, num_packs):
                break
            packs = deal(values[:, :taken], num_packs)
            exchange = Exchange(packs, caps, seed)
            exchange.level()
            over = exchange.repair()
            if over > _MANY * num_packs:
                break
            if over > max(1, _FEW * num_packs):
                continue
            evict(packs, caps, first)
            exchange.touch_up()
            swap_alike(packs, caps, per_step)
            pack[:taken] = packs.pack_of()
        left = np.flatnonzero(pack < 0)
        if not _fit_into(values[:, left], caps, per_step):
            more = _fitted(values[:, left], caps, per_step, int((left < first).sum()), seed)
            pack[left] = np.where(more >= 0, num_packs + more, -1)
        if not num_packs or (pack[:first] >= 0).all():
            return pack
    return _fitted(values, caps, per_step, first, seed)


def _amount(values: Ints, caps: Caps, per_step: int, first: int, fill: float) -> tuple[int, int]:
    """How many packs to plan, whole steps, and how many samples of the order fill them."""
    budgets = [
        (np.cumsum(value), cap * (fill if quantity == 0 else _TILE_FILL))
        for quantity, (value, cap) in enumerate(zip(values, caps, strict=True))
        if cap is not None
    ]
    if not values.shape[1]:
        return 0, 0
    steps = max(int(total[-1] / (budget * per_step)) for total, budget in budgets)
    num_packs = steps * per_step
    taken = min(
        int(np.searchsorted(total, budget * num_packs, "right")) for total, budget in budgets
    )
    return num_packs, max(taken, first)


def _too_large(tokens: Ints, caps: Caps, num_packs: int) -> bool:
    """Whether samples are too large to deal them out and hope."""
    max_tokens = caps[0] or 0
    above_half = int((tokens > max_tokens // 2).sum())
    return int(tokens.sum()) > _LARGE * max_tokens * len(tokens) or above_half > 0.9 * num_packs


def _fitted(values: Ints, caps: Caps, per_step: int, first: int, seed: int) -> Ints:
    """Packs by best fit decreasing, leveled by exchanges; packs short of a whole step are left."""
    pack = best_fit_decreasing(values, caps, first)
    num_packs = int(pack.max(initial=-1)) + 1
    keep = num_packs // per_step * per_step
    if not keep:
        return np.full_like(pack, -1)
    pack, num_packs = _with_slack(values, caps, first, pack)
    keep = num_packs // per_step * per_step
    # Those packs stay that hold samples of the window before; of the others, chance decides.
    rank = 1 + uniform_hash(seed, "kept packs", np.arange(num_packs))
    rank[: int(pack[:first].max(initial=-1)) + 1] = 0
    number = np.full(num_packs, -1)
    number[np.argsort(rank, kind="stable")[:keep]] = np.arange(keep)
    packs = gather(values, number[pack], keep)
    Exchange(packs, caps, seed).level(capped=True)
    swap_alike(packs, caps, per_step)
    return packs.pack_of()


def _with_slack(values: Ints, caps: Caps, first: int, pack: Ints) -> tuple[Ints, int]:
    """Packs a little less full, where they are too full to exchange anything and it costs little.

    Exchanges between packs that are full to the last token level nothing.
    """
    num_packs = int(pack.max()) + 1
    max_tokens = caps[0] or 0
    if int(values[0].sum()) <= _FILLS[0] * num_packs * max_tokens:
        return pack, num_packs
    less = int(_FILLS[0] * max_tokens)
    # A sample longer than that gets a pack of its own, which is then as full as the sample is.
    clipped = np.concatenate([np.minimum(values[:1], less), values[1:]])
    slack = best_fit_decreasing(clipped, (less, *caps[1:]), first)
    more = int(slack.max()) + 1
    wider = int(slack[:first].max(initial=-1)) > int(pack[:first].max(initial=-1))
    return (pack, num_packs) if wider or more > _SLACK * num_packs else (slack, more)


def _fit_into(values: Ints, caps: Caps, num_packs: int) -> bool:
    """Whether best fit decreasing puts the samples into so many packs."""
    if not values.shape[1]:
        return True
    # Any two packs of a best fit hold more than a full one together.
    if len(caps) == 2 and 2 * int(values[0].sum()) <= num_packs * (caps[0] or 0):
        return True
    return int(best_fit_decreasing(values, caps).max()) < num_packs


def _last_steps(values: Ints, caps: Caps, per_step: int, seed: int) -> Ints:
    """Packs for all of the samples, spread over as few steps as hold them."""
    fitted = best_fit_decreasing(values, caps)
    num_packs = -(-(int(fitted.max()) + 1) // per_step) * per_step
    packs = deal(values, num_packs)
    exchange = Exchange(packs, caps, seed)
    exchange.level()
    if exchange.repair():
        packs = gather(values, fitted, num_packs)
        Exchange(packs, caps, seed).level(capped=True)
    return packs.pack_of()


def _shuffled(pack: Ints, num_packs: int, seed: int) -> Ints:
    """Packs numbered by chance, so that steps are alike."""
    number = np.empty(num_packs + 1, dtype=np.int64)
    number[np.argsort(uniform_hash(seed, "steps", np.arange(num_packs)), kind="stable")] = (
        np.arange(num_packs)
    )
    number[-1] = -1
    return number[pack]
