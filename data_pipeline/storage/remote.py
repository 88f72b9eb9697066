"""Remote shards through fsspec: requests with retries and a deadline, and listings."""

import asyncio
import os
import threading
from collections.abc import Awaitable
from typing import Any, TypeVar

from data_pipeline.errors import InputError
from data_pipeline.storage import http
from data_pipeline.storage.drivers import hub_url, open_hub_files, open_system
from data_pipeline.storage.failures import driver_failure
from data_pipeline.storage.local import ends_inside
from data_pipeline.storage.read_counts import ReadCounts
from data_pipeline.storage.retry import StorageSettings, TransientError, with_retries
from data_pipeline.storage.shard import Shard, ShardStat, is_http

_Result = TypeVar("_Result")

_VERSIONS = ("ETag", "etag", "generation", "md5Hash", "LastModified", "updated", "mtime", "created")
_HUB_FILES = "files of hf"  # beside "hf", which lists them
_GRACE_S = 5.0  # for a request that was cut off to unwind


class RemoteFiles:
    """Requests to remote stores; thread-safe, and usable after a fork."""

    def __init__(self, settings: StorageSettings) -> None:
        self.counts = ReadCounts()
        self._settings = settings
        self._systems: dict[tuple[int, str], Any] = {}
        self._connected: set[tuple[int, str]] = set()
        self._lock = threading.Lock()

    def stat(self, shard: Shard) -> ShardStat:
        """Size and version; InputError if the shard is not there or the store does not answer."""

        def attempt(left_s: float) -> ShardStat:
            limits = self._limits(left_s)
            if address := self._address(shard):
                return self._run(shard, limits.total_s, http.stat(address, limits))
            info = self._call(shard, limits, "info", shard.url)
            version = next((str(info[name]) for name in _VERSIONS if info.get(name)), "")
            return ShardStat(int(info["size"]), version)

        return with_retries(attempt, f"{shard} cannot be reached", self._settings, self.counts)

    def read(self, shard: Shard, offset: int, size: int) -> bytes:
        """Exactly `size` bytes, or InputError."""

        def attempt(left_s: float) -> bytes:
            limits = self._limits(left_s)
            if address := self._address(shard):
                request = http.read(address, offset, size, limits)
                return self._run(shard, limits.total_s, request)
            end = offset + size
            data: bytes = self._call(shard, limits, "cat_file", shard.url, start=offset, end=end)
            if len(data) < size and self.stat(shard).bytes < end:
                raise ends_inside(shard, offset, size)
            if len(data) != size:
                raise TransientError(f"{len(data)} of {size} bytes were sent")
            return data

        if not size:
            return b""
        what = f"the {size} bytes at {offset} of {shard} cannot be read"
        data = with_retries(attempt, what, self._settings, self.counts)
        self.counts.add(bytes=size)
        return data

    def glob(self, pattern: str) -> list[str]:
        """URLs that match, sorted; InputError if the store cannot be listed."""

        def attempt(left_s: float) -> list[str]:
            system = self._system(Shard(pattern).protocol)
            system.invalidate_cache()  # the Hub's keeps one, whatever it is told
            found = self._call(Shard(pattern), http.Limits(left_s, left_s), "glob", pattern)
            return sorted(system.unstrip_protocol(path) for path in found)

        return with_retries(attempt, f"{pattern} cannot be listed", self._settings, self.counts)

    def _limits(self, left_s: float) -> http.Limits:
        return http.Limits(min(self._settings.timeout_s, left_s), left_s)

    def _address(self, shard: Shard) -> http.Address | None:
        """Where a shard is read by our own HTTP requests; None: by its driver's."""
        if is_http(shard.url):
            return http.Address(self._system(shard.protocol), shard.url, shard)
        if shard.protocol == "hf":
            system = self._system(_HUB_FILES)
            return http.Address(system, hub_url(shard, self._settings.options), shard)
        return None

    def _call(
        self, shard: Shard, limits: http.Limits, method: str, *args: Any, **options: Any
    ) -> Any:
        """A method of the file system, cut off after `limits.answer_s`."""
        system = self._system(shard.protocol)
        if not system.async_impl:  # memory:// and hf://
            request = asyncio.to_thread(getattr(system, method), *args, **options)
            return self._run(shard, limits.answer_s, request)
        key = os.getpid(), shard.protocol
        if key not in self._connected and (connect := getattr(system, "set_session", None)):
            # No answer to wait for: building a client may take seconds on a busy machine, and one
            # that is cut off is built anew by every attempt.
            self._run(shard, limits.total_s, connect())
            self._connected.add(key)
        return self._run(shard, limits.answer_s, getattr(system, f"_{method}")(*args, **options))

    def _run(self, shard: Shard, limit_s: float, request: Awaitable[_Result]) -> _Result:
        """The result of a coroutine on fsspec's own event loop, cut off after `limit_s`."""
        from fsspec.asyn import get_loop

        async def limited() -> _Result:
            return await asyncio.wait_for(request, limit_s)

        future = asyncio.run_coroutine_threadsafe(limited(), get_loop())
        try:
            return future.result(limit_s + _GRACE_S)
        except (InputError, TransientError):
            raise
        except Exception as error:
            future.cancel()
            raise driver_failure(shard, error) from error

    def _system(self, name: str) -> Any:
        """The file system of a protocol; a forked process gets its own."""
        key = os.getpid(), name
        with self._lock:
            if key not in self._systems:
                hub = name == _HUB_FILES
                settings = self._settings
                self._systems[key] = (
                    open_hub_files(settings) if hub else open_system(name, settings)
                )
            return self._systems[key]
