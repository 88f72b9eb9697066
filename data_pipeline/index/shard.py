"""The index of one shard: a row per usable sample, and what was wrong with the others.

Columns (S samples, I images; images in reading order, sample after sample):

    json_offset, json_size  int64 [S]    where the JSON member's bytes lie in the tar
    json_crc                uint32 [S]   CRC-32 of them: a reader can tell that they changed
    text_tokens             int32 [S]    tokens without image tokens, <img> and </img> included
    supervised_tokens       int32 [S]
    image_start             int64 [S+1]  images of sample i are image_start[i] .. image_start[i+1]
    image_offset, image_bytes  int64 [I]
    image_crc               uint32 [I]
    image_width, image_height  int32 [I] after EXIF rotation
    keys                    str [S]

Image sizes are stored raw, so that tiling settings can change without indexing again.
"""

import hashlib
import io
import json
import zipfile
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.chat import (
    ChatSettings,
    image_names,
    parse_sample,
    template_fingerprint,
    tokenize_chat,
)
from data_pipeline.errors import InputError
from data_pipeline.files import write_atomically
from data_pipeline.images import image_size
from data_pipeline.index.tar import (
    SampleMembers,
    forget_open_shards,
    group_samples,
    read_member,
    scan_tar,
)
from data_pipeline.tokenizer import Tokenizer

SCHEMA = 1  # raise it when the columns, or what their numbers mean, change
_MAX_JSON_BYTES = 64 << 20  # far above any conversation; a larger one would stall every reader

COLUMNS: dict[str, type[np.generic]] = {
    "json_offset": np.int64,
    "json_size": np.int64,
    "json_crc": np.uint32,
    "text_tokens": np.int32,
    "supervised_tokens": np.int32,
    "image_start": np.int64,
    "image_offset": np.int64,
    "image_bytes": np.int64,
    "image_crc": np.uint32,
    "image_width": np.int32,
    "image_height": np.int32,
    "keys": np.str_,
}


@dataclass(frozen=True)
class BadSample:
    """A sample that is left out: shard file name, key, and why."""

    shard: str
    key: str
    reason: str


@dataclass(frozen=True)
class ShardHeader:
    """What an index of a shard was made of, and its counts; also the shard's manifest entry."""

    schema: int
    shard: str
    bytes: int
    mtime_ns: int  # decides only whether to index again, so that copied data sets keep working
    tokenizer: str
    tokenizer_source: str
    template: str
    chat: dict[str, str]
    samples: int
    images: int
    text_tokens: int
    supervised_tokens: int
    digest: str  # of the columns: ties the manifest to this very file
    bad: list[dict[str, str]]

    def describes(self, shard: Path, tokenizer: Tokenizer, chat: ChatSettings) -> bool:
        """Whether indexing the shard as it is now would give this same index."""
        stat = shard.stat()
        return (
            self.schema == SCHEMA
            and (self.shard, self.bytes) == (shard.name, stat.st_size)
            and self.mtime_ns == stat.st_mtime_ns
            and self.tokenizer == tokenizer.fingerprint
            and self.template == template_fingerprint(chat)
        )


@dataclass
class ShardIndex:
    """A header and its columns by name (see the module's docstring)."""

    header: ShardHeader
    columns: dict[str, npt.NDArray[Any]]


def index_shard(shard: Path, tokenizer: Tokenizer, chat: ChatSettings) -> ShardIndex:
    """Index one shard; samples that cannot be used are listed in the header's `bad`.

    InputError if the tar is truncated or damaged, or has no usable sample.
    """
    forget_open_shards()  # an earlier file of this name may still be open
    stat = shard.stat()  # before reading: a shard that changes meanwhile will not fit it
    rows = _Rows()
    bad: list[dict[str, str]] = []
    for key, group in group_samples(scan_tar(shard)).items():
        try:
            rows.add(shard, key, group, tokenizer, chat)
        except InputError as error:
            bad.append({"key": key, "reason": str(error)})
    if not rows.keys:
        why = (
            f"{len(bad)} bad ones, the first: {bad[0]['key']}: {bad[0]['reason']}"
            if bad
            else ('samples are members "{key}.json" with their images "{key}.*"')
        )
        raise InputError(f"{shard} has no usable sample ({why})")
    columns = rows.columns()
    header = ShardHeader(
        schema=SCHEMA,
        shard=shard.name,
        bytes=stat.st_size,
        mtime_ns=stat.st_mtime_ns,
        tokenizer=tokenizer.fingerprint,
        tokenizer_source=tokenizer.source,
        template=template_fingerprint(chat),
        chat=chat.model_dump(),
        samples=len(rows.keys),
        images=len(columns["image_offset"]),
        text_tokens=int(columns["text_tokens"].sum(dtype=np.int64)),
        supervised_tokens=int(columns["supervised_tokens"].sum(dtype=np.int64)),
        digest=_digest(columns),
        bad=bad,
    )
    return ShardIndex(header, columns)


def save_shard_index(index: ShardIndex, path: Path) -> None:
    """Write an index of a shard as one .npz file, atomically."""
    buffer = io.BytesIO()
    header = np.array(json.dumps(asdict(index.header)))
    arrays: dict[str, Any] = {"header": header, **index.columns}
    np.savez_compressed(buffer, **arrays)
    write_atomically(path, buffer.getvalue())


def load_shard_index(path: Path) -> ShardIndex:
    """Read what `save_shard_index` wrote; InputError naming the file if it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            header = ShardHeader(**json.loads(str(file["header"])))
            return ShardIndex(header, {name: file[name] for name in COLUMNS})
    except _UNREADABLE as error:
        raise InputError(f"{path} cannot be read ({type(error).__name__}: {error})") from error


_UNREADABLE = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error)


@dataclass
class _Rows:
    """The columns while they grow."""

    keys: list[str] = field(default_factory=list)
    samples: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    image_start: list[int] = field(default_factory=lambda: [0])
    images: list[tuple[int, int, int, int, int]] = field(default_factory=list)

    def add(
        self,
        shard: Path,
        key: str,
        group: SampleMembers,
        tokenizer: Tokenizer,
        chat: ChatSettings,
    ) -> None:
        """Append a sample; InputError, and nothing appended, if it cannot be used."""
        if group.problem:
            raise InputError(group.problem)
        if "json" not in group.members:
            raise InputError(f"there is no member {key}.json beside {', '.join(group.members)}")
        text = group.members["json"]
        if text.size > _MAX_JSON_BYTES:
            raise InputError(f"the JSON has {text.size} bytes, more than {_MAX_JSON_BYTES}")
        data = read_member(shard, text.offset, text.size)
        messages = parse_sample(data)["messages"]
        images = [_image_row(shard, key, group, name) for name in image_names(messages)]
        tokens = tokenize_chat(messages, tokenizer, chat)
        self.keys.append(key)
        counts = len(tokens.input_ids), sum(tokens.supervised)
        self.samples.append((text.offset, text.size, zlib.crc32(data), *counts))
        self.images += images
        self.image_start.append(len(self.images))

    def columns(self) -> dict[str, npt.NDArray[Any]]:
        samples = zip(*self.samples, strict=True)
        images = zip(*self.images, strict=True) if self.images else [()] * 5
        lists = dict(zip(COLUMNS, [*samples, self.image_start, *images, self.keys], strict=True))
        return {name: np.array(lists[name], dtype=COLUMNS[name]) for name in COLUMNS}


def _image_row(
    shard: Path, key: str, group: SampleMembers, name: str
) -> tuple[int, int, int, int, int]:
    """Offset, bytes, CRC-32, width and height of one image of a sample."""
    member = group.members.get(name)
    if member is None:
        raise InputError(f"the messages name an image {name!r}: there is no member {key}.{name!a}")
    data = read_member(shard, member.offset, member.size)
    try:
        width, height = image_size(data)
    except InputError as error:
        raise InputError(f"image {name!r}: {error}") from error
    return member.offset, member.size, zlib.crc32(data), width, height


def _digest(columns: dict[str, npt.NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for name in COLUMNS:
        digest.update(columns[name].tobytes())
    return digest.hexdigest()
