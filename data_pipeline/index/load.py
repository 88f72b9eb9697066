"""The index of many shards in memory, checked against the shards and the settings in use."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_pipeline.chat import ChatSettings, template_fingerprint
from data_pipeline.errors import InputError
from data_pipeline.index.files import (
    Patterns,
    command,
    expand_shards,
    folders_of,
    manifest_path,
    npz_path,
    read_manifest,
)
from data_pipeline.index.shard import (
    COLUMNS,
    BadSample,
    ShardHeader,
    ShardIndex,
    load_shard_index,
)
from data_pipeline.index.tar import forget_open_shards, read_member
from data_pipeline.tokenizer import Tokenizer


@dataclass
class Index:
    """All samples of the shards, in the order of `shards` and of the tar (S samples, I images).

    `shard` [S] is a position in `shards`; the other columns are those of
    data_pipeline/index/shard.py, joined. `fingerprint` covers shard names, sizes and contents,
    tokenizer, template and schema, not where the shards lie. `bad` lists the samples left out.
    """

    shards: list[Path]
    fingerprint: str
    shard: npt.NDArray[np.int32]
    json_offset: npt.NDArray[np.int64]
    json_size: npt.NDArray[np.int64]
    json_crc: npt.NDArray[np.uint32]
    text_tokens: npt.NDArray[np.int32]
    supervised_tokens: npt.NDArray[np.int32]
    image_start: npt.NDArray[np.int64]
    image_offset: npt.NDArray[np.int64]
    image_bytes: npt.NDArray[np.int64]
    image_crc: npt.NDArray[np.uint32]
    image_width: npt.NDArray[np.int32]
    image_height: npt.NDArray[np.int32]
    keys: npt.NDArray[np.str_]
    bad: list[BadSample]

    def __len__(self) -> int:
        return len(self.shard)

    def name(self, i: int) -> str:
        """ "shard-file:key" of sample i, for messages."""
        return f"{self.shards[self.shard[i]].name}:{self.keys[i]}"

    def read_json(self, i: int) -> bytes:
        """The JSON member of sample i; InputError if it is not what was indexed."""
        where = int(self.json_offset[i]), int(self.json_size[i]), int(self.json_crc[i])
        return read_member(self.shards[self.shard[i]], *where)

    def read_images(self, i: int) -> list[bytes]:
        """The image files of sample i in reading order; InputError as in `read_json`."""
        return [
            read_member(
                self.shards[self.shard[i]],
                int(self.image_offset[j]),
                int(self.image_bytes[j]),
                int(self.image_crc[j]),
            )
            for j in range(self.image_start[i], self.image_start[i + 1])
        ]


def load_index(patterns: Patterns, tokenizer: Tokenizer, chat: ChatSettings) -> Index:
    """Load the index of the shards, joined in the order of `expand_shards`.

    InputError naming the file, the difference and the command to run, if a shard is not indexed,
    has another size than when it was, or was indexed with another tokenizer, chat template or
    version of this module, or if a file of the index is damaged.
    """
    shards = expand_shards(patterns)
    forget_open_shards()
    remedy = "; run: " + command(patterns, tokenizer, chat)
    parts: list[ShardIndex] = []
    try:
        manifests = {folder: read_manifest(folder) for folder in folders_of(shards)}
        for shard in shards:
            entry = manifests[shard.parent].get(shard.name)
            parts.append(_load_checked(shard, entry, tokenizer, chat))
    except InputError as error:
        raise InputError(f"{error}{remedy}") from error
    return _join(shards, parts)


def _join(shards: list[Path], parts: list[ShardIndex]) -> Index:
    headers = [part.header for part in parts]
    identity = [[h.shard, h.bytes, h.digest, h.tokenizer, h.template, h.schema] for h in headers]
    columns = {name: np.concatenate([p.columns[name] for p in parts]) for name in COLUMNS}
    images = np.concatenate([np.diff(part.columns["image_start"]) for part in parts])
    columns["image_start"] = np.concatenate([[0], np.cumsum(images)]).astype(np.int64)
    return Index(
        shards=shards,
        fingerprint=hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
        shard=np.repeat(np.arange(len(shards), dtype=np.int32), [h.samples for h in headers]),
        bad=[BadSample(h.shard, b["key"], b["reason"]) for h in headers for b in h.bad],
        **columns,
    )


def _load_checked(
    shard: Path, entry: ShardHeader | None, tokenizer: Tokenizer, chat: ChatSettings
) -> ShardIndex:
    """The index of one shard, or an InputError saying how it differs from what is wanted."""
    manifest = manifest_path(shard.parent)
    if entry is None:
        raise InputError(f"{shard} is not in the index {manifest}")
    if (size := shard.stat().st_size) != entry.bytes:
        raise InputError(f"{shard} has {size} bytes, but its index was made for {entry.bytes}")
    if entry.tokenizer != tokenizer.fingerprint:
        raise InputError(
            f"{manifest}: {shard.name} was indexed with the tokenizer {entry.tokenizer_source} "
            f"(fingerprint {entry.tokenizer[:12]}), the one in use is {tokenizer.source} "
            f"({tokenizer.fingerprint[:12]})"
        )
    if entry.template != template_fingerprint(chat):
        raise InputError(
            f"{manifest}: {shard.name} was indexed with the chat settings {entry.chat} "
            f"(fingerprint {entry.template[:12]}), those in use are {chat.model_dump()} "
            f"({template_fingerprint(chat)[:12]})"
        )
    file = npz_path(shard)
    if not file.exists():
        raise InputError(f"{file} is missing")
    loaded = load_shard_index(file)
    if loaded.header != entry:
        raise InputError(f"{file} does not belong to {manifest}: an indexing run was cut short")
    return loaded
