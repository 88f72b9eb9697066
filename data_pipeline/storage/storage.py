"""One way to list, size and read shards, wherever they lie."""

import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from data_pipeline.storage.expand import Patterns, expand
from data_pipeline.storage.joined import cut, join_ranges
from data_pipeline.storage.local import LocalFiles
from data_pipeline.storage.read_counts import ReadCounts
from data_pipeline.storage.remote import RemoteFiles
from data_pipeline.storage.remote_file import RemoteFile
from data_pipeline.storage.retry import StorageSettings
from data_pipeline.storage.shard import Shard, ShardStat

_STAT_THREADS = 32  # each waits for an answer
_FILE_BLOCK = 1 << 20  # bytes that a small read of an open file asks for


class Storage:
    """Access to shards; thread-safe, picklable, and usable after a fork."""

    def __init__(self, settings: StorageSettings | None = None) -> None:
        self.settings = settings or StorageSettings()
        self._local = LocalFiles()
        self._remote = RemoteFiles(self.settings)

    def __reduce__(self) -> tuple[Callable[[StorageSettings], "Storage"], tuple[StorageSettings]]:
        return Storage, (self.settings,)

    @property
    def counts(self) -> ReadCounts:
        """What remote reads took so far in this process."""
        return self._remote.counts

    def expand(self, patterns: Patterns) -> list[Shard]:
        """The tar files that patterns mean, sorted, each once.

        A pattern is a folder (its *.tar files), a glob, a path or a URL; "{000..015}" and "{a,b}"
        in it are expanded first. Folders and globs of URLs need a store that can be listed.
        InputError for a pattern that means no file, or one that is not named *.tar; a single URL is
        taken as it is.
        """
        return expand(patterns, self._remote.glob)

    def glob(self, pattern: str) -> list[str]:
        """URLs of the files of any kind that a pattern means, sorted: "hf://.../*.parquet".

        InputError if the store cannot be listed.
        """
        return self._remote.glob(pattern)

    def open(self, url: str) -> io.BufferedReader:
        """A file of any kind, by path or URL, for reading; InputError if it is not there."""
        file = Shard(url)
        raw = RemoteFile(partial(self.read, file), self.stat(file).bytes)
        return io.BufferedReader(raw, _FILE_BLOCK)

    def stat(self, shard: Shard) -> ShardStat:
        """Size and version; InputError if the shard is not there or cannot be reached."""
        return self._remote.stat(shard) if shard.is_remote else self._local.stat(shard)

    def stat_all(self, shards: Sequence[Shard]) -> list[ShardStat]:
        """`stat` of each, in order; several at a time."""
        if len(shards) < 2:
            return [self.stat(shard) for shard in shards]
        with ThreadPoolExecutor(min(_STAT_THREADS, len(shards))) as pool:
            futures = [pool.submit(self.stat, shard) for shard in shards]
            try:
                return [future.result() for future in futures]
            finally:
                pool.shutdown(cancel_futures=True)

    def read(self, shard: Shard, offset: int, size: int) -> bytes:
        """The `size` bytes at `offset`; InputError if it is not exactly these that come.

        A remote read ends within the settings' deadline.
        """
        if shard.is_remote:
            return self._remote.read(shard, offset, size)
        return self._local.read(shard, offset, size)

    def read_together(self, shard: Shard, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """`read` of each (offset, size); of a remote shard, neighbours come in one request."""
        if not shard.is_remote:
            return [self._local.read(shard, offset, size) for offset, size in ranges]
        reads = join_ranges(ranges, self.settings.max_gap_bytes)
        data = [self._remote.read(shard, offset, size) for offset, size in reads]
        used = sum(size for _, size in set(ranges))
        self.counts.add(bytes_unused=sum(map(len, data)) - used)
        return cut(reads, data, ranges)

    def forget(self) -> None:
        """Close files that are kept open, e.g. since shards were replaced."""
        self._local.forget()
