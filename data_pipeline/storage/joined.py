"""Members that lie together in a shard, read in one request."""

from bisect import bisect_right
from collections.abc import Sequence

MAX_JOINED_BYTES = 8 << 20
"""Larger reads are not joined further: they must come within the time of one request."""


def join_ranges(ranges: Sequence[tuple[int, int]], max_gap: int) -> list[tuple[int, int]]:
    """(offset, size) of the reads that cover these (offset, size), in order of offsets.

    Ranges at most `max_gap` bytes apart are one read of at most MAX_JOINED_BYTES.
    """
    joined: list[tuple[int, int]] = []
    for offset, size in sorted(ranges):
        if joined:
            start, length = joined[-1]
            end = max(start + length, offset + size)
            inside = end == start + length
            if inside or (offset <= start + length + max_gap and end - start <= MAX_JOINED_BYTES):
                joined[-1] = start, end - start
                continue
        joined.append((offset, size))
    return joined


def cut(
    reads: Sequence[tuple[int, int]], data: Sequence[bytes], ranges: Sequence[tuple[int, int]]
) -> list[bytes]:
    """The bytes of each range, out of the `data` of the reads that `join_ranges` made of them."""
    starts = [start for start, _ in reads]
    parts = []
    for offset, size in ranges:
        number = bisect_right(starts, offset) - 1
        at = offset - starts[number]
        parts.append(data[number][at : at + size])
    return parts
