"""Remote shards through fsspec: requests with retries and a deadline, and listings."""

import asyncio
import errno
import os
import threading
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from data_pipeline.errors import InputError
from data_pipeline.storage import http
from data_pipeline.storage.local import ends_inside
from data_pipeline.storage.retry import StorageSettings, TransientError, with_retries
from data_pipeline.storage.shard import Shard, ShardStat, is_http

_Result = TypeVar("_Result")

_DRIVERS = {
    "http": "aiohttp",
    "https": "aiohttp",
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "memory": "fsspec",
}
"""Protocols and the package that each needs: those whose requests can be cut off at a deadline."""

_VERSIONS = ("ETag", "etag", "generation", "md5Hash", "LastModified", "updated", "mtime", "created")
_GRACE_S = 5.0  # for a request that was cut off to unwind


class RemoteFiles:
    """Requests to remote stores; thread-safe, and usable after a fork."""

    def __init__(self, settings: StorageSettings) -> None:
        self._settings = settings
        self._systems: dict[tuple[int, str], Any] = {}
        self._lock = threading.Lock()

    def stat(self, shard: Shard) -> ShardStat:
        """Size and version; InputError if the shard is not there or the store does not answer."""

        def attempt(left_s: float) -> ShardStat:
            limits = self._limits(left_s)
            if is_http(shard.url):
                return self._run(shard, limits.total_s, http.stat, shard, limits)
            info = self._call(shard, limits.answer_s, "info", shard.url)
            version = next((str(info[name]) for name in _VERSIONS if info.get(name)), "")
            return ShardStat(int(info["size"]), version)

        return with_retries(attempt, f"{shard} cannot be reached", self._settings)

    def read(self, shard: Shard, offset: int, size: int) -> bytes:
        """Exactly `size` bytes, or InputError."""

        def attempt(left_s: float) -> bytes:
            limits = self._limits(left_s)
            if is_http(shard.url):
                return self._run(shard, limits.total_s, http.read, shard, offset, size, limits)
            end = offset + size
            data: bytes = self._call(
                shard, limits.answer_s, "cat_file", shard.url, start=offset, end=end
            )
            if len(data) < size and self.stat(shard).bytes < end:
                raise ends_inside(shard, offset, size)
            if len(data) != size:
                raise TransientError(f"{len(data)} of {size} bytes were sent")
            return data

        if not size:
            return b""
        return with_retries(
            attempt, f"the {size} bytes at {offset} of {shard} cannot be read", self._settings
        )

    def glob(self, pattern: str) -> list[str]:
        """URLs that match, sorted; InputError if the store cannot be listed."""

        def attempt(left_s: float) -> list[str]:
            system = self._system(Shard(pattern))
            found = self._call(Shard(pattern), left_s, "glob", pattern)
            return sorted(system.unstrip_protocol(path) for path in found)

        return with_retries(attempt, f"{pattern} cannot be listed", self._settings)

    def _limits(self, left_s: float) -> http.Limits:
        return http.Limits(min(self._settings.timeout_s, left_s), left_s)

    def _call(self, shard: Shard, limit_s: float, method: str, *args: Any, **options: Any) -> Any:
        """A method of the file system, cut off after `limit_s`."""
        system = self._system(shard)
        if not system.async_impl:  # memory://
            try:
                return getattr(system, method)(*args, **options)
            except Exception as error:
                raise _failure(shard, error) from error

        async def call(system: Any) -> Any:
            return await getattr(system, f"_{method}")(*args, **options)

        return self._run(shard, limit_s, call)

    def _run(
        self,
        shard: Shard,
        limit_s: float,
        function: Callable[..., Awaitable[_Result]],
        *args: Any,
    ) -> _Result:
        """The result of a coroutine on fsspec's own event loop, cut off after `limit_s`."""
        system = self._system(shard)

        async def limited() -> _Result:
            return await asyncio.wait_for(function(system, *args), limit_s)

        future = asyncio.run_coroutine_threadsafe(limited(), system.loop)
        try:
            return future.result(limit_s + _GRACE_S)
        except (InputError, TransientError):
            raise
        except Exception as error:
            future.cancel()
            raise _failure(shard, error) from error

    def _system(self, shard: Shard) -> Any:
        """The file system of a URL; a forked process gets its own."""
        protocol = shard.url.partition("://")[0]
        key = os.getpid(), protocol
        with self._lock:
            if key not in self._systems:
                self._systems[key] = _open_system(protocol, self._settings.options)
            return self._systems[key]


def _open_system(protocol: str, options: dict[str, Any]) -> Any:
    import fsspec  # a third of a second, which users of local shards save

    if protocol not in _DRIVERS:
        known = ", ".join(f"{name}://" for name in _DRIVERS)
        raise InputError(f"shards cannot be read from {protocol}://; known are paths and {known}")
    package = _DRIVERS[protocol]
    try:
        __import__(package)
        # Caches would hide that shards were replaced.
        return fsspec.filesystem(
            protocol, skip_instance_cache=True, use_listings_cache=False, **options
        )
    except ImportError as error:
        raise InputError(
            f"{protocol}:// needs the package {package}: run pip install {package}"
        ) from error
    except Exception as error:  # options are checked by the driver, in ways of its own
        raise InputError(
            f"{protocol}:// cannot be opened with data.storage.options {sorted(options)} "
            f"({type(error).__name__}: {error})"
        ) from error


def _failure(shard: Shard, error: Exception) -> Exception:
    """What a driver's exception means: another attempt may help, or it is final."""
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, FileNotFoundError):
        return InputError(f"the shard {shard} does not exist")
    if isinstance(error, PermissionError):
        return InputError(f"{shard} cannot be read ({what}); check data.storage.options")
    if isinstance(error, OSError) and error.errno == errno.EINVAL:  # S3: a range past the end
        return InputError(f"{shard} is shorter than it was ({what}); write or copy it again")
    if isinstance(error, TimeoutError):
        return TransientError("the store does not answer in time")
    # Drivers of S3 and Google report throttling, resets and server errors as OSError or HttpError.
    if isinstance(error, OSError) or "ClientError" in _bases(error) or "HttpError" in _bases(error):
        return TransientError(what)
    return InputError(f"{shard} cannot be read ({what}); check data.storage.options")


def _bases(error: Exception) -> list[str]:
    return [kind.__name__ for kind in type(error).__mro__]
