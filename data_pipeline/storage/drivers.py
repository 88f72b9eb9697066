"""The file systems of fsspec that shards are read through, set up so that retries are ours."""

import importlib
import inspect
import re
from functools import partial
from types import MethodType
from typing import Any
from urllib.parse import unquote

from data_pipeline.config_file import nearest
from data_pipeline.errors import InputError
from data_pipeline.storage.retry import StorageSettings
from data_pipeline.storage.shard import Shard

DRIVERS = {
    "http": "aiohttp",
    "https": "aiohttp",
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "hf": "huggingface_hub",
    "memory": "fsspec",
}
"""Protocols and the package that each needs: those whose requests can be cut off at a deadline."""

_HUB_PATH = re.compile(
    r"hf://(?:(?P<type>datasets|spaces|models)/)?(?P<repo>[^/@]+/[^/@]+)"
    r"(?:@(?P<revision>refs/(?:convert|pr)/[^/]+|[^/]+))?/(?P<file>.+)"
)


def open_system(protocol: str, settings: StorageSettings) -> Any:
    """The file system of a protocol; InputError naming the package that is missing."""
    import fsspec  # a third of a second, which users of local shards save

    if protocol not in DRIVERS:
        known = ", ".join(f"{name}://" for name in DRIVERS)
        raise InputError(f"shards cannot be read from {protocol}://; known are paths and {known}")
    package = DRIVERS[protocol]
    driver = _import(protocol)
    # Not what gcsfs registers: that first asks by gRPC, which not every network lets through.
    kind = (
        driver.core.GCSFileSystem if package == "gcsfs" else fsspec.get_filesystem_class(protocol)
    )
    named = [*inspect.signature(kind.__init__).parameters]
    for option in settings.options:
        # Drivers keep what they do not know, for requests of their own: only what is near is wrong.
        hint = nearest(option, named, cutoff=0.8)
        if option not in named and "did you mean" in hint:
            raise InputError(f"data.storage.options.{option}: no option of {protocol}://{hint}")
    try:
        # Caches would hide that shards were replaced.
        system = kind(
            skip_instance_cache=True, use_listings_cache=False, **_options(package, settings)
        )
    except Exception as error:  # options are checked by the driver, in ways of its own
        raise InputError(
            f"{protocol}:// cannot be opened with data.storage.options {sorted(settings.options)} "
            f"({type(error).__name__}: {error})"
        ) from error
    return _strict(system, package)


def open_hub_files(settings: StorageSettings) -> Any:
    """The HTTP file system that files of the Hub are read through, with the user's token."""
    _import("hf")
    from huggingface_hub.utils import build_hf_headers

    options = {
        "headers": build_hf_headers(token=settings.options.get("token")),
        # Proxies as the Hub's own requests find them.
        "client_kwargs": {"trust_env": True, **settings.options.get("client_kwargs", {})},
    }
    return open_system("https", settings.model_copy(update={"options": options}))


def hub_url(shard: Shard, options: dict[str, Any]) -> str:
    """Where a file of the Hub is read by HTTP; InputError if the shard names none."""
    from huggingface_hub import hf_hub_url

    match = _HUB_PATH.fullmatch(shard.url)
    if not match:
        raise InputError(f"{shard} names no file; expected hf://datasets/ORG/NAME[@REVISION]/FILE")
    return hf_hub_url(
        match["repo"],
        match["file"],
        repo_type=(match["type"] or "models").removesuffix("s"),
        revision=match["revision"] and unquote(match["revision"]),
        endpoint=options.get("endpoint"),
    )


def _import(protocol: str) -> Any:
    package = DRIVERS[protocol]
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise InputError(
            f"{protocol}:// needs the package {package}: run pip install {package}"
        ) from error


def _options(package: str, settings: StorageSettings) -> dict[str, Any]:
    options = dict(settings.options)
    if package == "s3fs":
        options["config_kwargs"] = {
            "retries": {"total_max_attempts": 1},
            "connect_timeout": settings.timeout_s,
            "read_timeout": settings.timeout_s,
            **options.get("config_kwargs", {}),
        }
    return options


def _strict(system: Any, package: str) -> Any:
    """The system without its own retries, which are not counted and know no deadline.

    And its listings fail where fsspec's leave out what could not be listed: shards must not be
    lost without a word.
    """
    if system.async_impl:  # a web server without listings has no page for the folder
        on_error = _raise_unless_missing if package == "aiohttp" else "raise"
        system._walk = partial(system._walk, on_error=on_error)
    if package == "s3fs":
        system.retries = 1
    once = getattr(getattr(type(system), "_request", None), "__wrapped__", None)
    if package == "gcsfs" and once:
        system._request = MethodType(once, system)
    return system


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
