"""Trying a remote request again: how often, how long to wait, and when to give up."""

import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import Field

from data_pipeline.config_file import Settings
from data_pipeline.errors import InputError
from data_pipeline.storage.read_counts import ReadCounts

_Result = TypeVar("_Result")


class StorageSettings(Settings):
    """How remote shards are read."""

    attempts: int = Field(5, gt=0)
    """Requests for one range before giving up."""
    backoff_s: float = Field(0.5, ge=0)
    """Wait before the second attempt; doubled after each, with jitter."""
    timeout_s: float = Field(30, gt=0)
    """How long one request may go without an answer."""
    deadline_s: float = Field(300, gt=0)
    """All attempts of one read together."""
    max_gap_bytes: int = Field(256 << 10, ge=0)
    """Members of a sample that are no further apart in the tar come in one request."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Passed to fsspec's file system, for example {anon: true} for public buckets."""


class StoreError(InputError):
    """A store does not give what is asked of it, whichever sample that is for."""


class StoreOutage(StoreError):
    """A store that failed in all attempts; it may be back later."""


class TransientError(Exception):
    """A failure that may pass; `wait_s` is what the server asked for."""

    def __init__(self, message: str, wait_s: float = 0) -> None:
        super().__init__(message)
        self.wait_s = wait_s


def with_retries(
    attempt: Callable[[float], _Result], what: str, settings: StorageSettings, counts: ReadCounts
) -> _Result:
    """What `attempt` returns; it is given the seconds that are left and raises TransientError.

    StoreOutage "`what`: ..." once the attempts or the time are used up.
    """
    start = time.monotonic()
    end = start + settings.deadline_s
    tried = 0
    while True:
        tried += 1
        counts.add(requests=1)
        try:
            return attempt(end - time.monotonic())
        except TransientError as error:
            problem = error
        # Jitter: many readers that failed together must not come back together.
        wait = settings.backoff_s * 2 ** (tried - 1) * random.uniform(0.5, 1.5)
        wait = max(wait, problem.wait_s)
        if tried == settings.attempts or time.monotonic() + wait >= end:
            break
        counts.retry(f"{what}: {problem}")
        time.sleep(wait)
    raise StoreOutage(
        f"{what}: {problem} (tried {tried} times in {time.monotonic() - start:.1f} s); check the "
        "store and the network, or raise data.storage.attempts and data.storage.deadline_s"
    ) from problem
