"""What a failed request means: another attempt may help, or one message says what to do."""

import re
from typing import Any

from data_pipeline.errors import InputError
from data_pipeline.storage.retry import StoreError, TransientError
from data_pipeline.storage.shard import Shard

_RETRIED = frozenset((408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524))
_REFUSED = frozenset((400, 401, 403))  # 400: how S3 answers HEAD when a token has expired
_REMEDIES = {
    "s3": "renew the AWS credentials (environment, profile, or key, secret and token in "
    "data.storage.options), or set anon: true there for a public bucket",
    "gs": "run gcloud auth application-default login, or set token in data.storage.options "
    "(anon for a public bucket)",
    "hf": "run hf auth login or set HF_TOKEN, and accept the terms on the data set's page if it "
    "has some",
}
_REMEDIES |= {"s3a": _REMEDIES["s3"], "gcs": _REMEDIES["gs"]}
_PASSING = frozenset(("ClientError", "HTTPClientError", "ConnectionError", "TransportError"))
"""Base classes of broken connections that are no OSError: aiohttp's, botocore's, httpx's."""
_OTHER_REMEDY = (
    "check the URL (a signed one expires) and the access rights (headers in data.storage.options)"
)


def refused(shard: Shard, what: str) -> StoreError:
    """The store does not accept the credentials, or there are none."""
    remedy = _REMEDIES.get(shard.protocol, _OTHER_REMEDY)
    return StoreError(
        f"{shard} cannot be read: {what}; the credentials are missing, expired or without the "
        f"right to read it: {remedy}"
    )


def missing(shard: Shard, what: str) -> StoreError:
    """There is no such file, or no bucket or repository of that name."""
    return StoreError(
        f"the shard {shard} does not exist ({what}); check the names of the file and of the "
        "bucket, repository or host"
    )


def status_failure(shard: Shard, status: int, reason: str, wait_s: float = 0) -> Exception:
    """What an HTTP status other than success means; `wait_s` is what the server asked for."""
    what = f"the server answers {status} {reason}".rstrip()
    if status in _RETRIED:
        return TransientError(what, wait_s)
    if status in _REFUSED:
        return refused(shard, what)
    if status == 404:
        return missing(shard, "404")
    if status == 416:
        return InputError(f"{shard} is shorter than it was ({what}); write or copy it again")
    return StoreError(f"{shard} cannot be read: {what}; check the URL and data.storage.options")


def driver_failure(shard: Shard, error: Exception) -> Exception:
    """What an exception of fsspec or of a store's driver means."""
    reason = " ".join(str(error).split())
    what = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
    if isinstance(error, FileNotFoundError):
        hidden = error.__cause__  # fsspec's HTTP and the Hub's say so of other failures, too
        if isinstance(hidden, Exception) and _status(hidden) != 404:
            return driver_failure(shard, hidden)
        return missing(shard, reason if _is_sentence(reason) else "not found")
    if isinstance(error, TimeoutError):
        return TransientError("the store does not answer in time")
    if status := _status(error):
        return status_failure(shard, status, f"({reason})")
    if isinstance(error, PermissionError) or _concerns_credentials(error):
        return refused(shard, what)
    if isinstance(error, OSError) or _PASSING & {kind.__name__ for kind in type(error).__mro__}:
        return TransientError(what)
    return StoreError(f"{shard} cannot be read ({what}); check data.storage.options")


def _is_sentence(reason: str) -> bool:
    """Whether it is more than a path."""
    return " " in reason and "://" not in reason


def _status(error: BaseException) -> int:
    """The HTTP status that an exception tells of, wherever its driver keeps it; 0 if none."""
    response: Any = getattr(error, "response", getattr(error.__cause__, "response", None))
    if isinstance(response, dict):  # botocore
        return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    for place, name in ((response, "status_code"), (error, "status"), (error, "code")):
        if isinstance(status := getattr(place, name, None), int):
            return status
    return 403 if str(error).startswith("Forbidden") else 0  # gcsfs


def _concerns_credentials(error: Exception) -> bool:
    return bool(re.search("Credential|Token|RefreshError", type(error).__name__))
