"""Which shards patterns mean."""

import glob
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from braceexpand import braceexpand

from data_pipeline.errors import InputError
from data_pipeline.storage.shard import Shard, is_http

Patterns = str | Sequence[str]


def expand(patterns: Patterns, list_remote: Callable[[str], list[str]]) -> list[Shard]:
    """The tar files that patterns mean, sorted, each once; see `Storage.expand`."""
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns:
        raise InputError("no shards are given; give a folder of .tar files, a glob or paths")
    found: dict[str, Shard] = {}
    for pattern in patterns:
        try:
            texts = list(braceexpand(pattern))
        except ValueError as error:
            raise InputError(f"unbalanced braces in the shard pattern {pattern!r}") from error
        for text in texts:
            for shard in _matches(text.removeprefix("file://"), list_remote):
                identity = shard.url if shard.is_remote else os.path.realpath(shard.url)
                found.setdefault(identity, shard)
    return sorted(found.values())


def _matches(text: str, list_remote: Callable[[str], list[str]]) -> list[Shard]:
    return _remote_matches(text, list_remote) if "://" in text else _local_matches(text)


def _remote_matches(url: str, list_remote: Callable[[str], list[str]]) -> list[Shard]:
    place = url.partition("?")[0] if is_http(url) else url
    if not glob.has_magic(place):
        if place.endswith(".tar"):
            return [Shard(url)]  # whether it exists shows when it is read
        url = place = place.rstrip("/") + "/*.tar"
    shards = [Shard(found) for found in list_remote(place)]
    shards = [shard for shard in shards if shard.name.endswith(".tar")]
    if not shards:
        raise InputError(
            f"no .tar file matches {place}; a store that cannot be listed (most web servers) needs "
            "a brace pattern such as https://host/{000..127}.tar"
        )
    return shards


def _local_matches(text: str) -> list[Shard]:
    path = Path(text).expanduser()
    if path.is_dir():
        shards = sorted(path.glob("*.tar"))
        if not shards:
            raise InputError(f"there are no .tar files in the folder {text}")
        return [Shard(str(shard)) for shard in shards]
    if path.is_file():
        if path.suffix != ".tar":
            raise InputError(f"{text} is not named *.tar; shards are uncompressed tar files")
        return [Shard(str(path))]
    if glob.has_magic(text):
        names = [Path(name) for name in glob.glob(str(path), recursive=True)]  # noqa: PTH207
        shards = [shard for shard in names if shard.suffix == ".tar" and shard.is_file()]
        if not shards:
            raise InputError(f"no .tar file matches {text}")
        return [Shard(str(shard)) for shard in shards]
    raise InputError(f"the shard {text} does not exist; give a folder, a glob or existing paths")
