"""Packs that fit for certain: best fit, and putting right what little does not fit."""

from bisect import bisect_left, insort

import numpy as np
import numpy.typing as npt

from data_pipeline.balance.deal import Caps, Ints, Packs
from data_pipeline.errors import InputError

_MOST_TRIES = 64  # packs looked at for one that has room for the tiles too


def best_fit(
    lengths: npt.ArrayLike,
    max_tokens: int,
    tiles: Ints | None = None,
    max_tiles: int | None = None,
) -> Ints:
    """Best fit: each sample in turn goes into the fullest pack that still has room for it.

    In the given order, so that a pack holds a random mix of a shuffled window; longest first would
    pack a little tighter but collects samples of one size, and with them of one token count.
    Deterministic. Uses at most 17/10 of the fewest possible packs, plus one (Johnson et al., SIAM
    J. Comput. 3, 1974), if tokens alone are capped; far fewer where samples are short against a
    pack.

    Args:
        lengths: tokens of each sample, whole numbers [S] in 0..max_tokens.
        max_tokens: tokens a pack can hold.
        tiles, max_tiles: int64 [S] and what a pack can hold of them, if anything caps it.

    Returns:
        int64 [S], the pack of each sample; packs are numbered as they were opened.

    Raises:
        InputError: a length is negative or larger than max_tokens.
    """
    tokens = np.asarray(lengths, dtype=np.int64)
    if ((tokens < 0) | (tokens > max_tokens)).any():
        worst = int(np.argmax((tokens < 0) | (tokens > max_tokens)))
        raise InputError(
            f"item {worst} has length {tokens[worst]}, which is not in 0..{max_tokens}; leave it "
            "out or raise max_tokens"
        )
    tile_counts = tiles.tolist() if tiles is not None and max_tiles is not None else None
    shortest = int(tokens.min(initial=max_tokens))
    base = len(tokens) + 1  # more than any pack's number
    open_packs: list[int] = []  # room * base + pack number, ascending
    tile_rooms: list[int] = []
    packs: list[int] = []
    num_packs = 0
    for item, length in enumerate(tokens.tolist()):
        place = bisect_left(open_packs, length * base)
        if tile_counts is not None:
            place = _with_room(open_packs, place, base, tile_rooms, tile_counts[item])
        if place < len(open_packs):
            room, pack = divmod(open_packs.pop(place), base)
        else:
            room, pack = max_tokens, num_packs
            num_packs += 1
            tile_rooms.append(max_tiles or 0)
        packs.append(pack)
        if tile_counts is not None:
            tile_rooms[pack] -= tile_counts[item]
        if room - length >= shortest:  # otherwise nothing that is left can go there
            insort(open_packs, (room - length) * base + pack)
    return np.array(packs, dtype=np.int64)


def best_fit_decreasing(values: Ints, caps: Caps, first: int = 0) -> Ints:
    """`best_fit` of the longest samples first, the first `first` samples before all others.

    At most 11/9 of the fewest possible packs and one more, if tokens alone are capped (Johnson et
    al.); 1 % more than the fewest where samples are small.

    Args:
        values: int64 [D, S], tokens first, each sample within the caps.
        caps: that of tokens is not None.
        first: samples that are packed as if there were no others.

    Returns:
        int64 [S]; packs are numbered as they were opened.
    """
    max_tokens, max_tiles = _token_and_tile_caps(caps)
    tokens = values[0]
    order = np.lexsort((-tokens, np.arange(len(tokens)) >= first))
    pack_of = np.empty(len(tokens), dtype=np.int64)
    pack_of[order] = best_fit(tokens[order], max_tokens, values[-1][order], max_tiles)
    return pack_of


def gather(values: Ints, pack_of: Ints, num_packs: int) -> Packs:
    """Packs of the samples with a number from 0 on; int64 [D, S] and [S]."""
    depth, num_samples = values.shape
    member = np.flatnonzero(pack_of >= 0)
    member = member[np.argsort(pack_of[member], kind="stable")]
    pack = pack_of[member]
    count = np.bincount(pack, minlength=num_packs)
    place = np.arange(len(member)) - (np.cumsum(count) - count)[pack]
    items = np.full((num_packs, int(count.max(initial=0)) + 2), num_samples)
    items[pack, place] = member
    padded = np.concatenate([values, np.zeros((depth, 1), dtype=np.int64)], axis=1)
    loads = np.stack([value[items].sum(axis=1) for value in padded])
    return Packs(padded, items, count, loads)


def evict(packs: Packs, caps: Caps, first: int) -> None:
    """Take samples out of packs that are over a cap, and put them where there is room, if anywhere.

    Samples below `first` stay as long as others can go.
    """
    out: list[int] = []
    for pack in np.flatnonzero(_over(packs.loads, caps)).tolist():
        while _over(packs.loads[:, pack : pack + 1], caps)[0]:
            place = _to_evict(packs, pack, caps, first)
            out.append(int(packs.items[pack, place]))
            _set(packs, pack, place, packs.num_samples)
    for item in sorted(out, key=lambda i: (i >= first, -int(packs.values[0, i]), i)):
        value = packs.values[:, item : item + 1]
        with_room = np.flatnonzero(~_over(packs.loads + value, caps))
        if len(with_room):
            pack = int(with_room[packs.loads[0][with_room].argmax()])
            _set(packs, pack, int(packs.count[pack]), item)


def _to_evict(packs: Packs, pack: int, caps: Caps, first: int) -> int:
    """Place of the smallest sample without which the pack fits, else of the largest one."""
    items = packs.items[pack, : packs.count[pack]]
    tokens = packs.values[0][items]
    rest = packs.loads[:, pack : pack + 1] - packs.values[:, items]
    enough = ~_over(rest, caps)
    late = items >= first
    order = np.lexsort((items, np.where(enough, tokens, -tokens), ~enough, ~late))
    return int(order[0])


def _over(loads: Ints, caps: Caps) -> np.ndarray:
    """Which of the packs are over a cap; int64 [D, K] -> bool [K]."""
    over = np.zeros(loads.shape[1], dtype=bool)
    for load, cap in zip(loads, caps, strict=True):
        if cap is not None:
            over |= load > cap
    return over


def _set(packs: Packs, pack: int, place: int, item: int) -> None:
    packs.set_place(np.array([pack]), np.array([place]), np.array([item]))


def _with_room(
    open_packs: list[int], place: int, base: int, tile_rooms: list[int], tiles: int
) -> int:
    """The first place from `place` on whose pack has room for the tiles; else the list's end."""
    for candidate in range(place, min(place + _MOST_TRIES, len(open_packs))):
        if tile_rooms[open_packs[candidate] % base] >= tiles:
            return candidate
    return len(open_packs)


def _token_and_tile_caps(caps: Caps) -> tuple[int, int | None]:
    assert caps[0] is not None
    return caps[0], caps[2] if len(caps) > 2 else None
