"""Which shards patterns mean."""

import glob
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from braceexpand import braceexpand

from data_pipeline.errors import InputError
from data_pipeline.storage.shard import Shard, is_http
from data_pipeline.walk import walk

Patterns = str | Sequence[str]
_PACKED = re.compile(r".+\.(tgz|tar\.\w+)", re.IGNORECASE).fullmatch
_PACKED_ADVICE = "shards are uncompressed tar files: gunzip a .tar.gz first"


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
        shards = sorted(p for p in path.iterdir() if p.name.lower().endswith(".tar"))
        shards = [shard for shard in shards if not shard.name.startswith(".")]
        if not shards:
            raise InputError(f"there are no .tar files in the folder {text}{_what_is_there(path)}")
        return [Shard(str(shard)) for shard in shards]
    if path.is_file():
        if path.suffix.lower() != ".tar":
            raise InputError(f"{text} is not named *.tar; {_PACKED_ADVICE}")
        return [Shard(str(path))]
    if glob.has_magic(text):
        names = [Path(name) for name in glob.glob(str(path), recursive=True)]  # noqa: PTH207
        shards = [shard for shard in names if shard.suffix.lower() == ".tar" and shard.is_file()]
        if not shards:
            others = f"; it matches {names[0]}: {_PACKED_ADVICE}" if names else ""
            raise InputError(f"no .tar file matches {text}{others}")
        return [Shard(str(shard)) for shard in shards]
    raise InputError(f"the shard {text} does not exist; give a folder, a glob or existing paths")


def passed_over(patterns: Patterns) -> list[str]:
    """What folders of shards hold beside the shards that are taken: packed ones, subfolders."""
    patterns = [patterns] if isinstance(patterns, str) else patterns
    folders = [Path(text).expanduser() for text in patterns if "://" not in text]
    there = [(folder, _what_is_there(folder)) for folder in folders if folder.is_dir()]
    return [f"{folder} holds other shards, passed over{what}" for folder, what in there if what]


def _what_is_there(folder: Path) -> str:
    """What a folder holds that may be shards, for a message: packed ones, or those below."""
    packed = sorted(p.name for p in folder.iterdir() if _PACKED(p.name))
    if packed:
        more = f" and {len(packed) - 1} more" if len(packed) > 1 else ""
        return f", but {packed[0]}{more}: {_PACKED_ADVICE}"
    tars, _ = walk(folder, lambda path: path.suffix.lower() == ".tar")
    below = sorted({str(path.parent) for path in tars} - {str(folder)})
    if below:
        more = f" and {len(below) - 3} more" if len(below) > 3 else ""
        return f"; name the folders that hold some: {', '.join(below[:3])}{more}"
    return ""
