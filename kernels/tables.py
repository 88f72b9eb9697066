"""Pooling of a patch grid to n x n tokens as two small matrices, one per axis.

Both pooling modes are linear and separable: `tokens = P(n, H) @ patches @ P(n, W)^T` per channel.
The matrices depend on (n, axis length, mode) only, so they are built once, in float64, and shared
by every implementation of the op.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


def _adaptive(n: int, size: int) -> np.ndarray:
    """Token i averages the patches floor(i * size / n) .. ceil((i + 1) * size / n)."""
    table = np.zeros((n, size))
    for i in range(n):
        start, stop = i * size // n, -(-(i + 1) * size // n)
        table[i, start:stop] = 1.0 / (stop - start)
    return table


def _resize(n: int, size: int) -> np.ndarray:
    """Bilinear up-sampling to R = ceil(size / n) * n, then the mean of each R / n samples."""
    resized = -(-size // n) * n
    source = np.arange(resized) * ((size - 1) / (resized - 1)) if resized > 1 else np.zeros(1)
    low = np.minimum(np.floor(source).astype(np.int64), size - 1)
    high = np.minimum(low + 1, size - 1)
    fraction = source - low
    bilinear = np.zeros((resized, size))
    rows = np.arange(resized)
    np.add.at(bilinear, (rows, low), 1.0 - fraction)
    np.add.at(bilinear, (rows, high), fraction)
    return bilinear.reshape(n, resized // n, size).mean(axis=1)


_TABLES: dict[str, Callable[[int, int], np.ndarray]] = {"adaptive": _adaptive, "resize": _resize}
POOL_MODES = tuple(_TABLES)


@lru_cache(maxsize=1024)
def pooling_table(n: int, size: int, mode: str) -> np.ndarray:
    """Weights with which `size` patches along one axis make `n` tokens.

    Returns float64 [n, size], read-only; each row sums to 1.

    n: tokens along this axis, >= 1; may exceed `size`.
    size: patches along this axis, >= 1.
    mode: "adaptive" uses the windows of `torch.nn.functional.adaptive_avg_pool2d`; "resize"
        up-samples bilinearly (align_corners) to the next multiple of n, then averages, as the
        released TokenFLEX projector does (arXiv 2504.03154 and the code published with its
        weights).

    Raises ValueError for an unknown mode and for n or size below 1.
    """
    if mode not in POOL_MODES:
        raise ValueError(f"pool mode {mode!r} is unknown; use one of {', '.join(POOL_MODES)}")
    if n < 1 or size < 1:
        raise ValueError(f"pooling {size} patches to {n} tokens; both must be at least 1")
    table = _TABLES[mode](n, size)
    table.setflags(write=False)  # the cached array is handed to every caller
    return table


@dataclass(frozen=True)
class SpanTables:
    """Sparse rows of several pooling tables and of their transposes, each row one run of entries.

    index: int32 [R, 3]: a row's first entry, the number of entries, where their weights start.
    weights: float32 [total]. begin: (n, size) -> the first of its n + size rows: those of the n
    tokens, over the patches, then those of the `size` patches, over the tokens.
    """

    index: Tensor
    weights: Tensor
    begin: dict[tuple[int, int], int]


@lru_cache(maxsize=256)
def span_tables(pairs: tuple[tuple[int, int], ...], mode: str, device: torch.device) -> SpanTables:
    """The tables of these pairs (n, size) on a device; the copy does not wait for it."""
    index, weights, begin = [], [], {}
    rows = placed = 0
    for n, size in pairs:
        spans, entries = _pair_spans(n, size, mode)
        begin[n, size], rows = rows, rows + len(spans)
        index.append(spans + np.array([0, 0, placed]))
        weights.append(entries)
        placed += len(entries)
    with torch.inference_mode(False):  # training may use what inference has cached
        tensors = [
            torch.from_numpy(np.concatenate(parts).astype(dtype))
            for parts, dtype in ((index, np.int32), (weights, np.float32))
        ]
        if device.type == "cuda":
            tensors = [t.pin_memory().to(device, non_blocking=True) for t in tensors]
    return SpanTables(tensors[0], tensors[1], begin)


@lru_cache(maxsize=4096)
def _pair_spans(n: int, size: int, mode: str) -> tuple[np.ndarray, np.ndarray]:
    """One table's rows, then columns, without the zeros around: int64 [n + size, 3], [total]."""
    table = pooling_table(n, size, mode)
    index, weights, placed = [], [], 0
    for dense in (table, table.T):
        filled = dense != 0
        first = filled.argmax(axis=1)
        length = dense.shape[1] - filled[:, ::-1].argmax(axis=1) - first
        columns = np.arange(dense.shape[1])
        inside = (columns >= first[:, None]) & (columns < (first + length)[:, None])
        index.append(np.stack([first, length, placed + np.cumsum(length) - length], axis=1))
        weights.append(dense[inside])
        placed += int(length.sum())
    return np.concatenate(index), np.concatenate(weights)
