"""Loading an index: manifests and shard sizes at once, columns when they are needed."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from data_pipeline.chat import ChatSettings, template_fingerprint
from data_pipeline.errors import InputError
from data_pipeline.index.columns import ShardColumns, load_columns
from data_pipeline.index.header import ShardHeader
from data_pipeline.index.index import Index
from data_pipeline.index.index_files import IndexFiles, command, find_index_files
from data_pipeline.storage import Patterns, Shard, Storage
from data_pipeline.tokenizer import Tokenizer


def load_index(
    patterns: Patterns,
    tokenizer: Tokenizer,
    chat: ChatSettings,
    index_dir: Path | str | None = None,
    storage: Storage | None = None,
) -> Index:
    """Load the index of the shards, in the order of `Storage.expand`.

    Reads manifests and asks for the sizes of the shards. InputError naming the file, the difference
    and the command to run, if a shard is not indexed, has another size than when it was, or was
    indexed with another tokenizer, chat template or version of this module. A damaged file of the
    index shows when its columns are first read.
    """
    storage = storage or Storage()
    shards = storage.expand(patterns)
    storage.forget()
    files = find_index_files(shards, index_dir)
    remedy = "; run: " + command(patterns, tokenizer, chat, index_dir)
    try:
        headers = read_headers(shards, files)
        for shard, header in zip(shards, headers, strict=True):
            _check_settings(files[shard.folder], header, tokenizer, chat)
    except InputError as error:
        raise InputError(f"{error}{remedy}") from error
    for shard, header, stat in zip(shards, headers, storage.stat_all(shards), strict=True):
        if stat.bytes != header.bytes:
            raise InputError(
                f"{shard} has {stat.bytes} bytes, but its index was made for {header.bytes}{remedy}"
            )
    return make_index(shards, headers, files, storage, remedy)


def read_headers(shards: list[Shard], files: dict[str, IndexFiles]) -> list[ShardHeader]:
    """The manifest's entry of each shard; InputError if it has none."""
    manifests = {folder: place.read_manifest() for folder, place in files.items()}
    for shard in shards:
        if shard.name not in manifests[shard.folder]:
            raise InputError(f"{shard} is not in the index {files[shard.folder].manifest}")
    return [manifests[shard.folder][shard.name] for shard in shards]


def make_index(
    shards: list[Shard],
    headers: list[ShardHeader],
    files: dict[str, IndexFiles],
    storage: Storage,
    remedy: str = "",
) -> Index:
    """The index of headers that were checked; `remedy` ends the errors of `Index.columns`."""
    identity = [header.identity() for header in headers]
    counts = ("samples", "images", "text_tokens", "supervised_tokens", "unused_images")
    return Index(
        shards,
        [header.samples for header in headers],
        sum(header.images for header in headers),
        _loader(shards, headers, files, remedy),
        fingerprint=hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
        bad=[bad for header in headers for bad in header.bad_samples()],
        totals={name: sum(getattr(h, name) for h in headers) for name in counts},
        storage=storage,
    )


def _loader(
    shards: list[Shard], headers: list[ShardHeader], files: dict[str, IndexFiles], remedy: str
) -> Callable[[int], ShardColumns]:
    def load(number: int) -> ShardColumns:
        shard = shards[number]
        try:
            return load_shard_columns(shard, headers[number], files[shard.folder])
        except InputError as error:
            raise InputError(f"{error}{remedy}") from error

    return load


def load_shard_columns(shard: Shard, header: ShardHeader, files: IndexFiles) -> ShardColumns:
    """The columns of a shard; InputError if they are not those of this entry of the manifest."""
    entry, columns = load_columns(files.columns(shard))
    if entry != header.to_dict():
        raise InputError(
            f"{files.columns(shard)} does not belong to {files.manifest}: an indexing run was cut "
            "short, or ended since this index was loaded"
        )
    return columns


def _check_settings(
    files: IndexFiles, header: ShardHeader, tokenizer: Tokenizer, chat: ChatSettings
) -> None:
    if header.tokenizer != tokenizer.fingerprint:
        raise InputError(
            f"{files.manifest}: {header.shard} was indexed with the tokenizer "
            f"{header.tokenizer_source} (fingerprint {header.tokenizer[:12]}), the one in use is "
            f"{tokenizer.source} ({tokenizer.fingerprint[:12]})"
        )
    if header.template != template_fingerprint(chat):
        raise InputError(
            f"{files.manifest}: {header.shard} was indexed with the chat settings {header.chat} "
            f"(fingerprint {header.template[:12]}), those in use are {chat.model_dump()} "
            f"({template_fingerprint(chat)[:12]})"
        )
