"""Where the files of an index lie.

<index>/manifest.json       one header per indexed shard of a folder
<index>/<shard stem>.npz    its columns
<index>/partial/            finished shards of a run that is not finished
<index>/.lock               held by a run while it lasts

<index> is <folder of the shards>/index, or with an index folder of its own one folder in there for
each folder of shards.
"""

import hashlib
import json
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.chat import ChatSettings
from data_pipeline.errors import InputError
from data_pipeline.files import write_atomically
from data_pipeline.index.header import SCHEMA, ShardHeader
from data_pipeline.storage import Patterns, Shard
from data_pipeline.tokenizer import Tokenizer


@dataclass(frozen=True)
class IndexFiles:
    """The files of the index of the shards in one folder."""

    shards: str  # path or URL of the folder
    folder: Path

    @property
    def manifest(self) -> Path:
        """Lists the indexed shards."""
        return self.folder / "manifest.json"

    @property
    def partial_folder(self) -> Path:
        """Where finished shards wait for the rest of their run."""
        return self.folder / "partial"

    @property
    def lock(self) -> Path:
        """Held exclusively by the run that publishes, shared by those that index a share."""
        return self.folder / ".lock"

    def columns(self, shard: Shard) -> Path:
        """The published columns of a shard."""
        return self.folder / f"{shard.stem}.npz"

    def partial(self, shard: Shard) -> Path:
        """The columns of a shard that wait to be published."""
        return self.partial_folder / f"{shard.stem}.npz"

    def read_manifest(self) -> dict[str, ShardHeader]:
        """Headers by shard file name; InputError if there is none, or none of this schema."""
        try:
            manifest = json.loads(self.manifest.read_text())
            if manifest["schema"] == SCHEMA:
                return {name: ShardHeader(**entry) for name, entry in manifest["shards"].items()}
            problem = f"has the schema {manifest['schema']}, this version reads {SCHEMA}"
        except FileNotFoundError:
            problem = f"does not exist: the shards in {self.shards} are not indexed"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            problem = f"cannot be read ({type(error).__name__}: {error})"
        raise InputError(f"{self.manifest} {problem}")

    def write_manifest(self, headers: dict[str, ShardHeader]) -> None:
        """Write the manifest, with totals for people to read."""
        counts = ("samples", "images", "text_tokens", "supervised_tokens")
        totals = {name: sum(getattr(h, name) for h in headers.values()) for name in counts}
        manifest = {
            "schema": SCHEMA,
            "totals": {**totals, "bad": sum(len(h.bad) for h in headers.values())},
            "shards": {name: headers[name].to_dict() for name in sorted(headers)},
        }
        write_atomically(self.manifest, json.dumps(manifest, indent=1).encode())


def find_index_files(
    shards: Sequence[Shard], index_dir: Path | str | None
) -> dict[str, IndexFiles]:
    """The index files of the shards by their folder; InputError where a place must be given."""
    return {
        folder: IndexFiles(folder, _place(folder, index_dir))
        for folder in sorted({shard.folder for shard in shards})
    }


def _place(folder: str, index_dir: Path | str | None) -> Path:
    is_remote = "://" in folder
    if index_dir is None:
        if is_remote:
            raise InputError(
                f"the index of {folder} cannot lie beside its shards: name a local folder for it "
                "with index_dir (--index-dir)"
            )
        return Path(folder) / "index"
    # A folder's own name helps people; the digest tells a/train from b/train.
    where = folder if is_remote else str(Path(folder).resolve())
    name = re.sub(r"[^\w.-]+", "-", where.rstrip("/").rpartition("/")[2]) or "shards"
    return Path(index_dir).expanduser() / f"{name}-{hashlib.sha256(where.encode()).hexdigest()[:8]}"


def find_tokenizer(shards: Sequence[Shard]) -> Path:
    """`tokenizer.model` in the first shard's folder or one up; InputError if in neither."""
    local = [shard for shard in shards if not shard.is_remote]
    if not local:
        raise InputError("the shards are remote: name the tokenizer with --tokenizer")
    folder = Path(os.path.abspath(local[0].folder))  # noqa: PTH100 (keeps links)
    for place in (folder, folder.parent):
        if (place / "tokenizer.model").is_file():
            return place / "tokenizer.model"
    raise InputError(
        f"there is no tokenizer.model in {folder} or {folder.parent}; name one with --tokenizer "
        "(a .model file, a Hugging Face folder or hub name)"
    )


def command(
    patterns: Patterns,
    tokenizer: Tokenizer | None,
    chat: ChatSettings | None,
    index_dir: Path | str | None,
) -> str:
    """The command line that indexes the patterns with these settings."""
    words = ["python", "-m", "data_pipeline.index"]
    words += [patterns] if isinstance(patterns, str) else patterns
    words += ["--tokenizer", tokenizer.source] if tokenizer else []
    if chat and chat.system != ChatSettings().system:
        words += ["--system", chat.system]
    words += ["--index-dir", str(index_dir)] if index_dir else []
    return shlex.join(words)
