"""Reading through a shard in large blocks."""

from data_pipeline.storage.shard import Shard
from data_pipeline.storage.storage import Storage

_KEPT_BLOCKS = 3  # a sample may lie across the border of two


class ReadAhead:
    """Small reads near each other, going forward, served from blocks of `block` bytes.

    A pass through a remote shard is one request per block. Not thread-safe.
    """

    def __init__(self, storage: Storage, shard: Shard, size: int, block: int = 8 << 20) -> None:
        """`size`: bytes of the shard."""
        self.shard, self.size = shard, size
        self._storage, self._block = storage, block
        self._blocks: dict[int, bytes] = {}
        self._start, self._data = 0, b""  # the block that was used last

    def read(self, offset: int, size: int) -> bytes:
        """The bytes at `offset`, fewer than `size` where the shard ends."""
        at = offset - self._start
        if at >= 0 and at + size <= len(self._data):
            return self._data[at : at + size]
        size = min(size, self.size - offset)
        if size <= 0:
            return b""
        if size > self._block:
            return self._storage.read(self.shard, offset, size)
        first, last = offset // self._block, (offset + size - 1) // self._block
        data = b"".join(self._load(number) for number in range(first, last + 1))
        at = offset - first * self._block
        return data[at : at + size]

    def _load(self, number: int) -> bytes:
        data = self._blocks.get(number)
        if data is None:
            start = number * self._block
            size = min(self._block, self.size - start)
            data = self._storage.read(self.shard, start, size)
            while len(self._blocks) >= _KEPT_BLOCKS:
                del self._blocks[min(self._blocks)]
            self._blocks[number] = data
        self._start, self._data = number * self._block, data
        return data
