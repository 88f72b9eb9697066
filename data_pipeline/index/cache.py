"""The columns of the shards in use, in memory."""

import threading
from collections import OrderedDict
from collections.abc import Callable

from data_pipeline.index.columns import ShardColumns


class ColumnsCache:
    """Columns by shard number, those used last up to `max_bytes`; thread-safe."""

    def __init__(self, load: Callable[[int], ShardColumns], max_bytes: int) -> None:
        """`load`: reads the columns of a shard."""
        self._load, self._max_bytes = load, max_bytes
        self._kept: OrderedDict[int, ShardColumns] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, shard: int) -> ShardColumns:
        """The columns of a shard; whatever `load` raises."""
        with self._lock:
            if shard in self._kept:
                self._kept.move_to_end(shard)
                return self._kept[shard]
        columns = self._load(shard)  # outside the lock: others must not wait for the disk
        with self._lock:
            if shard not in self._kept:
                self._kept[shard] = columns
                self._bytes += columns.nbytes
            while self._bytes > self._max_bytes and len(self._kept) > 1:
                self._bytes -= self._kept.popitem(last=False)[1].nbytes
            return columns
