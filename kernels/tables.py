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
class Spans:
    """Sparse rows, each one run of neighbouring entries, for all sides 1 .. max at once.

    index: int32 [R, 3], the first entry, the number of entries, where their weights start.
    weights: float32 [total].
    """

    index: Tensor
    weights: Tensor


@dataclass(frozen=True)
class AxisTables:
    """The pooling tables of both axes on a device, and their adjoints.

    down, across: which patches make token i of side n, and with what weights, along the rows and
        the columns of the grid; row n * (n - 1) / 2 + i.
    up, back: which tokens of side n patch p goes to; row (n - 1) * size + p.
    """

    down: Spans
    across: Spans
    up: Spans
    back: Spans


def axis_tables(
    largest_side: int, grid: tuple[int, int], mode: str, device: torch.device
) -> AxisTables:
    """Tables for every side up to `largest_side` (and some beyond, so that few are ever built)."""
    top = max(32, 1 << (largest_side - 1).bit_length())
    return _axis_tables(top, *grid, mode, device)


@lru_cache(maxsize=64)
def _axis_tables(top: int, height: int, width: int, mode: str, device: torch.device) -> AxisTables:
    with torch.inference_mode(False):  # training may use what inference has cached
        return AxisTables(
            down=_spans(_all_sides(top, height, mode), device),
            across=_spans(_all_sides(top, width, mode), device),
            up=_spans([table.T for table in _all_sides(top, height, mode)], device),
            back=_spans([table.T for table in _all_sides(top, width, mode)], device),
        )


def _all_sides(top: int, size: int, mode: str) -> list[np.ndarray]:
    return [pooling_table(n, size, mode) for n in range(1, top + 1)]


def _spans(tables: list[np.ndarray], device: torch.device) -> Spans:
    """The rows of dense tables, one table after the other, without the zeros around each run."""
    index, weights, placed = [], [], 0
    for table in tables:
        filled = table != 0
        first = filled.argmax(axis=1)
        length = table.shape[1] - filled[:, ::-1].argmax(axis=1) - first
        columns = np.arange(table.shape[1])
        inside = (columns >= first[:, None]) & (columns < (first + length)[:, None])
        starts = placed + np.cumsum(length) - length
        index.append(np.stack([first, length, starts], axis=1))
        weights.append(table[inside])
        placed += int(length.sum())
    return Spans(
        torch.tensor(np.concatenate(index), dtype=torch.int32, device=device),
        torch.tensor(np.concatenate(weights), dtype=torch.float32, device=device),
    )
