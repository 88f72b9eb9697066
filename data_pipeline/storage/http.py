"""Ranged reads over HTTP, on the session of fsspec's HTTP file system.

fsspec's own `cat_file` would read a whole shard into memory where a server ignores "Range", and
would not tell a range that the file's end cut short from a connection that broke.
"""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from data_pipeline.errors import InputError
from data_pipeline.storage.failures import status_failure
from data_pipeline.storage.local import ends_inside
from data_pipeline.storage.retry import StoreError, TransientError
from data_pipeline.storage.shard import Shard, ShardStat

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)$")


@dataclass(frozen=True)
class Limits:
    """Seconds for one answer to arrive, and for the whole request."""

    answer_s: float
    total_s: float


@dataclass(frozen=True)
class Address:
    """Where a shard is read: a file system of fsspec, and the URL there."""

    system: Any
    url: str
    shard: Shard


async def stat(address: Address, limits: Limits) -> ShardStat:
    """Size and version of a shard, from a request for its first byte: not all servers know HEAD."""
    async with _get(address, 0, 1, limits) as answer:
        version = _version(answer)
        if answer.status == 416:
            return ShardStat(0, version)
        _, _, total = _content_range(answer, address.shard)
        if total is None:
            raise InputError(f"{address.shard}: the server does not tell the size of the file")
        return ShardStat(total, version)


async def read(address: Address, offset: int, size: int, limits: Limits) -> bytes:
    """Exactly `size` bytes at `offset`; TransientError if another attempt may help."""
    shard = address.shard
    async with _get(address, offset, size, limits) as answer:
        if answer.status == 416:
            raise ends_inside(shard, offset, size)
        first, last, total = _content_range(answer, shard)
        if first != offset or last >= offset + size:
            raise StoreError(
                f"{shard}: the server was asked for bytes {offset}-{offset + size - 1} and answers "
                f"with {first}-{last}"
            )
        if last < offset + size - 1:
            if total == last + 1:
                raise ends_inside(shard, offset, size)
            raise TransientError(f"only {last + 1 - first} of {size} bytes were sent")
        data: bytes = await answer.content.readexactly(size)
        return data


@asynccontextmanager
async def _get(address: Address, offset: int, size: int, limits: Limits) -> AsyncIterator[Any]:
    """The answer to a request for a range: its status is 206, or 416 for a range past the end."""
    import aiohttp  # optional: only HTTP needs it

    system, shard = address.system, address.shard
    options = {**system.kwargs}
    options["headers"] = {
        **options.get("headers", {}),
        "Range": f"bytes={offset}-{offset + size - 1}",
        "Accept-Encoding": "identity",  # a range of a compressed body would be another range
    }
    options["timeout"] = aiohttp.ClientTimeout(
        total=limits.total_s, sock_connect=limits.answer_s, sock_read=limits.answer_s
    )
    try:
        session = await system.set_session()
        async with session.get(system.encode_url(address.url), **options) as answer:
            _check_status(answer, shard)
            yield answer
    except aiohttp.InvalidURL as error:
        raise InputError(f"{shard} is not a URL") from error  # the error may tell a secret
    except asyncio.IncompleteReadError as error:
        raise TransientError(
            f"the body ended after {len(error.partial)} of {size} bytes"
        ) from error
    except TimeoutError as error:
        raise TransientError("the server does not answer in time") from error
    except (aiohttp.ClientError, OSError) as error:
        raise TransientError(f"{type(error).__name__}: {error}") from error


def _check_status(answer: Any, shard: Shard) -> None:
    if answer.status == 200:
        raise StoreError(
            f"{shard}: the server ignores requests for a range of bytes, so that every sample "
            "would read the whole shard; use a server or store that knows ranges, or copy the "
            "shards"
        )
    if answer.status not in (206, 416):
        asked = answer.headers.get("Retry-After", "")
        wait_s = float(asked) if asked.isdigit() else 0
        raise status_failure(shard, answer.status, answer.reason, wait_s)


def _version(answer: Any) -> str:
    """The mark of the content; the Hub gives its own before it redirects to where the bytes lie."""
    linked = [one.headers.get("X-Linked-ETag") for one in answer.history]
    found = (*linked, answer.headers.get("ETag"), answer.headers.get("Last-Modified"))
    return next(filter(None, found), "")


def _content_range(answer: Any, shard: Shard) -> tuple[int, int, int | None]:
    """First and last byte of the body, and the size of the file if the server tells it."""
    header = answer.headers.get("Content-Range", "")
    match = _CONTENT_RANGE.match(header)
    if not match:
        raise StoreError(
            f"{shard}: the server answers a request for a range with Content-Range {header!r}"
        )
    return int(match[1]), int(match[2]), None if match[3] == "*" else int(match[3])
