"""Pooling of a patch grid to n x n tokens as two small matrices, one per axis.

Both pooling modes are linear and separable: `tokens = P(n, H) @ patches @ P(n, W)^T` per channel.
The matrices depend on (n, axis length, mode) only, so they are built once, in float64, and shared
by every implementation of the op.
"""

from functools import lru_cache

import numpy as np

POOL_MODES = ("adaptive", "resize")


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
    table = _adaptive(n, size) if mode == "adaptive" else _resize(n, size)
    table.setflags(write=False)  # the cached array is handed to every caller
    return table


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
