"""Local shards: ranged reads from files that stay open."""

import os
from functools import lru_cache

from data_pipeline.errors import InputError
from data_pipeline.storage.shard import Shard, ShardStat

_MAX_OPEN = 64


class LocalFiles:
    """Ranged reads of local files; thread-safe."""

    def __init__(self) -> None:
        # Opening is the slow part of a small read on a parallel file system.
        self._open = lru_cache(maxsize=_MAX_OPEN)(_OpenFile)

    def stat(self, shard: Shard) -> ShardStat:
        """Size and modification time; InputError if the file is not there."""
        try:
            stat = os.stat(shard.url)  # noqa: PTH116 (a Path costs more than the call)
        except OSError as error:
            raise _cannot_read(shard, error) from error
        return ShardStat(stat.st_size, str(stat.st_mtime_ns))

    def read(self, shard: Shard, offset: int, size: int) -> bytes:
        """Exactly `size` bytes, or InputError."""
        try:
            file = self._open(shard.url)  # held here: the cache may drop it meanwhile
            data = os.pread(file.descriptor, size, offset)
            while len(data) < size:  # network file systems may return less than was asked for
                more = os.pread(file.descriptor, size - len(data), offset + len(data))
                if not more:
                    raise ends_inside(shard, offset, size)
                data += more
        except OSError as error:
            raise _cannot_read(shard, error) from error
        return data

    def forget(self) -> None:
        """Close the files, e.g. since shards were replaced."""
        self._open.cache_clear()


class _OpenFile:
    """A file descriptor that closes once neither the cache nor a reader holds it."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def ends_inside(shard: Shard, offset: int, size: int) -> InputError:
    """The shard is shorter than the range that was asked for."""
    return InputError(
        f"{shard} ends inside the {size} bytes at {offset}: it is shorter than it was; write or "
        "copy it again"
    )


def _cannot_read(shard: Shard, error: OSError) -> InputError:
    if isinstance(error, FileNotFoundError):
        return InputError(f"the shard {shard} does not exist")
    return InputError(f"the shard {shard} cannot be read: {error.strerror or error}")
