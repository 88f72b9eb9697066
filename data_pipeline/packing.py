"""Putting samples of known length into packs of a fixed number of tokens."""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from data_pipeline.errors import InputError


def best_fit(lengths: Sequence[int] | np.ndarray, max_tokens: int) -> list[list[int]]:
    """Best fit: each sample in turn goes into the fullest pack that still has room for it.

    In the given order, so that a pack holds a random mix of a shuffled window; longest first would
    pack a little tighter but collects samples of one size, and with them of one token count.
    Deterministic. Uses at most 17/10 of the fewest possible packs, plus one (Johnson et al., SIAM
    J. Comput. 3, 1974); far fewer where samples are short against a pack.

    Args:
        lengths: tokens of each sample, in 0..max_tokens.
        max_tokens: tokens a pack can hold.

    Returns:
        Indices into `lengths` per pack, ascending.

    Raises:
        InputError: a length is negative or larger than max_tokens.
    """
    array = np.asarray(lengths, dtype=np.int64)
    if not len(array):
        return []
    if array.min() < 0 or array.max() > max_tokens:
        worst = int(np.argmax((array < 0) | (array > max_tokens)))
        raise InputError(
            f"item {worst} has length {array[worst]}, which is not in 0..{max_tokens}; leave it "
            "out or raise max_tokens"
        )
    shortest = int(array.min())
    base = len(array)  # more than any pack's number
    packs: list[list[int]] = []
    open_packs: list[int] = []  # room * base + pack number, ascending
    for item, length in enumerate(array.tolist()):
        place = bisect_left(open_packs, length * base)
        if place < len(open_packs):
            room, pack = divmod(open_packs.pop(place), base)
            packs[pack].append(item)
        else:
            room, pack = max_tokens, len(packs)
            packs.append([item])
        if room - length >= shortest:  # otherwise nothing that is left can go there
            insort(open_packs, (room - length) * base + pack)
    return packs
