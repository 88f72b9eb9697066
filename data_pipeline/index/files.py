"""Which shards are meant, and where the files of their index lie.

<folder>/index/manifest.json       one header per indexed shard
<folder>/index/<shard stem>.npz    its columns
<folder>/index/partial/            finished shards of a run that is not finished
"""

import glob
import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from braceexpand import braceexpand

from data_pipeline.chat import ChatSettings
from data_pipeline.errors import InputError
from data_pipeline.files import write_atomically
from data_pipeline.index.shard import SCHEMA, ShardHeader
from data_pipeline.tokenizer import Tokenizer

Patterns = str | Sequence[str]


def expand_shards(patterns: Patterns) -> list[Path]:
    """The tar files that patterns mean, sorted by path, each once.

    A pattern is a folder (its *.tar files), a glob, or a path; "{000..015}" and "{a,b}" in it are
    expanded first. InputError for a pattern that means no file, or one that is not named *.tar.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns:
        raise InputError("no shards are given; give a folder of .tar files, a glob or paths")
    found: dict[Path, Path] = {}
    for pattern in patterns:
        try:
            texts = list(braceexpand(pattern))
        except ValueError as error:
            raise InputError(f"unbalanced braces in the shard pattern {pattern!r}") from error
        for text in texts:
            for path in _matches(text):
                found.setdefault(path.resolve(), path)
    return sorted(found.values())


def find_tokenizer(patterns: Patterns) -> Path:
    """`tokenizer.model` in the first shard's folder or one up; InputError if in neither."""
    folder = Path(os.path.abspath(expand_shards(patterns)[0].parent))  # noqa: PTH100 (keeps links)
    for place in (folder, folder.parent):
        if (place / "tokenizer.model").is_file():
            return place / "tokenizer.model"
    raise InputError(
        f"there is no tokenizer.model in {folder} or {folder.parent}; name one with --tokenizer "
        "(a .model file, a Hugging Face folder or hub name)"
    )


def folders_of(shards: Sequence[Path]) -> list[Path]:
    """The folders the shards lie in, sorted."""
    return sorted({shard.parent for shard in shards})


def manifest_path(folder: Path) -> Path:
    """The manifest of the shards in a folder."""
    return folder / "index" / "manifest.json"


def npz_path(shard: Path) -> Path:
    """The published columns of a shard."""
    return shard.parent / "index" / f"{shard.stem}.npz"


def partial_folder(folder: Path) -> Path:
    """Where finished shards wait for the rest of their run."""
    return folder / "index" / "partial"


def partial_path(shard: Path) -> Path:
    """The columns of a shard that wait to be published."""
    return partial_folder(shard.parent) / f"{shard.stem}.npz"


def read_manifest(folder: Path) -> dict[str, ShardHeader]:
    """Headers by shard file name; InputError if there is no manifest, or none of this schema."""
    path = manifest_path(folder)
    try:
        manifest = json.loads(path.read_text())
        if manifest["schema"] == SCHEMA:
            return {name: ShardHeader(**entry) for name, entry in manifest["shards"].items()}
        problem = f"has the schema {manifest['schema']}, this version reads {SCHEMA}"
    except FileNotFoundError:
        problem = f"does not exist: the shards in {folder} are not indexed"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"cannot be read ({type(error).__name__}: {error})"
    raise InputError(f"{path} {problem}")


def write_manifest(folder: Path, headers: dict[str, ShardHeader]) -> None:
    """Write the manifest, with totals for people to read."""
    counts = ("samples", "images", "text_tokens", "supervised_tokens")
    totals = {name: sum(getattr(h, name) for h in headers.values()) for name in counts}
    manifest = {
        "schema": SCHEMA,
        "totals": {**totals, "bad": sum(len(h.bad) for h in headers.values())},
        "shards": {name: asdict(headers[name]) for name in sorted(headers)},
    }
    write_atomically(manifest_path(folder), json.dumps(manifest, indent=1).encode())


def command(patterns: Patterns, tokenizer: Tokenizer, chat: ChatSettings) -> str:
    """The command line that indexes the patterns with these settings."""
    words = ["python", "-m", "data_pipeline.index"]
    words += [patterns] if isinstance(patterns, str) else patterns
    words += ["--tokenizer", tokenizer.source]
    if chat.system != ChatSettings().system:
        words += ["--system", chat.system]
    return shlex.join(words)


def _matches(text: str) -> list[Path]:
    path = Path(text).expanduser()
    if path.is_dir():
        shards = sorted(path.glob("*.tar"))
        if not shards:
            raise InputError(f"there are no .tar files in the folder {text}")
        return shards
    if path.is_file():
        if path.suffix != ".tar":
            raise InputError(f"{text} is not named *.tar; shards are uncompressed tar files")
        return [path]
    if glob.has_magic(text):
        shards = [Path(name) for name in glob.glob(str(path), recursive=True)]  # noqa: PTH207
        shards = [shard for shard in shards if shard.suffix == ".tar" and shard.is_file()]
        if not shards:
            raise InputError(f"no .tar file matches {text}")
        return shards
    raise InputError(f"the shard {text} does not exist; give a folder, a glob or existing paths")
