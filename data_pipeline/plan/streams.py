"""The endless order of one dataset's samples, addressed by position.

An epoch is a permutation of blocks, runs of neighbouring samples of one shard, each shuffled in
itself. A window therefore reads a few shards, not all of them, and only those shards' columns of
the index are in memory, however large the dataset is.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from data_pipeline.draw import uniform_hash
from data_pipeline.mixture import Dataset

_BLOCKS_PER_WINDOW = 16  # enough different shards in a window to mix their contents


@dataclass(frozen=True)
class _Epoch:
    """blocks: int64 [B], block numbers in this epoch's order. ends: int64 [B], cumulative sizes."""

    blocks: np.ndarray
    ends: np.ndarray


class Stream:
    """The samples of a dataset, epoch after epoch.

    Args:
        dataset: whose samples.
        seed: of the run.
        window_samples: of the plan; sets the size of the blocks.
    """

    def __init__(self, dataset: Dataset, seed: int, window_samples: int) -> None:
        self._key, self._seed = dataset.key, seed
        self.size = len(dataset.index)
        self._first, self._sizes = _blocks(
            dataset.index.starts, max(1, window_samples // _BLOCKS_PER_WINDOW)
        )
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def take(self, position: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples `position` .. `position + count` of the stream.

        Returns:
            (number in the index, epoch) of each, int64 [count].
        """
        samples, epochs = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        while count:
            epoch, offset = divmod(position, self.size)
            part = self._part(epoch, offset, min(count, self.size - offset))
            samples.append(part)
            epochs.append(np.full(len(part), epoch))
            position, count = position + len(part), count - len(part)
        return np.concatenate(samples), np.concatenate(epochs)

    def _part(self, epoch: int, offset: int, count: int) -> np.ndarray:
        """Samples of one epoch, int64 [count]."""
        order = self._epoch(epoch)
        begin = int(np.searchsorted(order.ends, offset, side="right"))
        end = int(np.searchsorted(order.ends, offset + count, side="left")) + 1
        parts = [self._shuffled(epoch, block) for block in order.blocks[begin:end].tolist()]
        before = int(order.ends[begin - 1]) if begin else 0
        return np.concatenate(parts)[offset - before : offset - before + count]

    def _shuffled(self, epoch: int, block: int) -> np.ndarray:
        samples = np.arange(self._first[block], self._first[block] + self._sizes[block])
        return samples[_permutation(self._seed, "order", self._key, epoch, samples)]

    def _make_epoch(self, epoch: int) -> _Epoch:
        numbers = np.arange(len(self._sizes))
        blocks = numbers[_permutation(self._seed, "blocks", self._key, epoch, numbers)]
        return _Epoch(blocks, np.cumsum(self._sizes[blocks]))


def _permutation(seed: int, purpose: str, key: int, epoch: int, numbers: np.ndarray) -> np.ndarray:
    return np.argsort(uniform_hash(seed, purpose, key, epoch, numbers), kind="stable")


def _blocks(starts: np.ndarray, largest: int) -> tuple[np.ndarray, np.ndarray]:
    """(first sample, size) of each block: shards cut into equal parts of at most `largest`.

    Args:
        starts: int64 [shards + 1], first sample of each shard.
    """
    sizes = np.diff(starts)
    parts = -(-sizes // largest)  # [shards]
    shard = np.repeat(np.arange(len(sizes)), parts)  # [B]
    part = np.arange(len(shard)) - (np.cumsum(parts) - parts)[shard]
    first = starts[shard] + sizes[shard] * part // parts[shard]
    last = starts[shard] + sizes[shard] * (part + 1) // parts[shard]
    return first, last - first
