"""A remote file as Python reads files, for readers such as pyarrow's of parquet."""

import io
from collections.abc import Callable


class RemoteFile(io.RawIOBase):
    """Reads of a file of `size` bytes, by a function of offset and size."""

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        super().__init__()
        self._read, self._size, self._place = read, size, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place, in bytes from the start, the place before or the end."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = max(0, start + offset)
        return self._place

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill the buffer as far as the file goes; returns the number of bytes."""
        size = max(0, min(len(buffer), self._size - self._place))
        buffer[:size] = self._read(self._place, size)
        self._place += size
        return size
