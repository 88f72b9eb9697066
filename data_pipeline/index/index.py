"""The index of a data set in memory: counts of every shard, columns of those in use."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.index.cache import ColumnsCache
from data_pipeline.index.columns import ShardColumns
from data_pipeline.index.header import BadSample
from data_pipeline.index.sample import read_checked, sample_of
from data_pipeline.storage import Shard, Storage

_CACHE_BYTES = 256 << 20  # 2 M samples of one image each; a window of the planner is less


class Index:
    """All samples of the shards, in the order of `shards` and of the tar.

    Attributes:
        shards: the tar files.
        fingerprint: covers shard names, sizes and contents, tokenizer, template and schema, not
            where the shards lie.
        bad: the samples left out.
        sizes: int64 [number of shards], samples of each.
        starts: int64 [number of shards + 1]; sample i belongs to the shard
            `searchsorted(starts, i, "right") - 1`.
        images: total number of images.

    `columns(shard)` reads the columns of one shard. The whole-set arrays (`text_tokens` and so on)
    join those of all shards when first asked for: they are for small sets.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        sizes: Sequence[int],
        images: int,
        load: Callable[[int], ShardColumns],
        *,
        fingerprint: str = "",
        bad: Sequence[BadSample] = (),
        totals: Mapping[str, int] | None = None,
        storage: Storage | None = None,
    ) -> None:
        """`load`: reads the columns of a shard, given its position in `shards`."""
        self.shards, self.fingerprint, self.bad = list(shards), fingerprint, list(bad)
        self.sizes = np.array(sizes, dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)
        self.images = images
        self.totals = dict(totals or {})
        self.storage = storage or Storage()
        self._cache = ColumnsCache(load, _CACHE_BYTES)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def columns(self, shard: int) -> ShardColumns:
        """The columns of a shard; read when first asked for, and kept while there is room.

        Safe to call from several threads. InputError if the file of the index is missing, damaged
        or not that of the manifest.
        """
        return self._cache.get(shard)

    def locate(self, i: int) -> tuple[int, int]:
        """The shard of sample i, and its place in that shard's columns."""
        shard = int(np.searchsorted(self.starts, i, "right")) - 1
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        return shard, int(i - self.starts[shard])

    def name(self, i: int) -> str:
        """ "shard-file:key" of sample i, for messages."""
        return f"{self.shard_name(i)}:{self.key(i)}"

    def shard_name(self, i: int) -> str:
        """File name of the shard of sample i."""
        return self.shards[self.locate(i)[0]].name

    def key(self, i: int) -> str:
        """Key of sample i."""
        shard, row = self.locate(i)
        return str(self.columns(shard).keys[row])

    def image_sizes(self, i: int) -> npt.NDArray[np.int64]:
        """Width and height of the images of sample i, int64 [images, 2]."""
        shard, row = self.locate(i)
        columns = self.columns(shard)
        own = slice(columns.image_start[row], columns.image_start[row + 1])
        sizes = [columns.image_width[own], columns.image_height[own]]
        return np.stack(sizes, axis=1).astype(np.int64)

    def read(self, i: int) -> tuple[dict[str, Any], list[bytes]]:
        """`read_sample` and `read_images`; of a remote shard in one request if they lie together.

        InputError if the bytes are not those that were indexed.
        """
        text, *images = self._read(i, [self._text(i), *self._images(i)])
        return self._sample(i, text), images

    def read_sample(self, i: int) -> dict[str, Any]:
        """Sample i as {"messages": [...], "metadata": {...}}, the messages checked.

        A caption becomes two turns; its metadata are those of the member that holds it. InputError
        as in `read`.
        """
        return self._sample(i, self.read_text(i))

    def read_text(self, i: int) -> bytes:
        """The member with the text of sample i; InputError as in `read`."""
        return self._read(i, [self._text(i)])[0]

    def read_images(self, i: int) -> list[bytes]:
        """The image files of sample i in reading order; InputError as in `read`."""
        return self._read(i, self._images(i))

    def _read(self, i: int, members: list[tuple[int, int, int]]) -> list[bytes]:
        return read_checked(self.storage, self.shards[self.locate(i)[0]], members)

    def _sample(self, i: int, text: bytes) -> dict[str, Any]:
        shard, row = self.locate(i)
        c = self.columns(shard)
        images = int(c.image_start[row + 1] - c.image_start[row])
        return sample_of(int(c.kind[row]), text, images)

    def _text(self, i: int) -> tuple[int, int, int]:
        """Offset, size and CRC-32 of the text member."""
        shard, row = self.locate(i)
        c = self.columns(shard)
        return int(c.text_offset[row]), int(c.text_size[row]), int(c.text_crc[row])

    def _images(self, i: int) -> list[tuple[int, int, int]]:
        """Offset, size and CRC-32 of each image."""
        shard, row = self.locate(i)
        c = self.columns(shard)
        own = slice(c.image_start[row], c.image_start[row + 1])
        columns = (c.image_offset[own], c.image_bytes[own], c.image_crc[own])
        return list(zip(*(column.tolist() for column in columns), strict=True))

    def join(self, name: str) -> npt.NDArray[Any]:
        """One column of all shards; for small sets."""
        parts = [getattr(self.columns(shard), name) for shard in range(len(self.shards))]
        if name == "image_start":
            counts = np.concatenate([np.diff(part) for part in parts])
            return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return np.concatenate(parts)

    @cached_property
    def shard(self) -> npt.NDArray[np.int32]:
        """Position in `shards`, int32 [S]."""
        return np.repeat(np.arange(len(self.shards), dtype=np.int32), self.sizes)

    @cached_property
    def text_tokens(self) -> npt.NDArray[np.int32]:
        """int32 [S]; see data_pipeline/index/columns.py, also for the following."""
        return self.join("text_tokens")

    @cached_property
    def supervised_tokens(self) -> npt.NDArray[np.int32]:
        """int32 [S]."""
        return self.join("supervised_tokens")

    @cached_property
    def image_start(self) -> npt.NDArray[np.int64]:
        """int64 [S+1], into the whole-set columns of images."""
        return self.join("image_start")

    @cached_property
    def image_width(self) -> npt.NDArray[np.int32]:
        """int32 [I]."""
        return self.join("image_width")

    @cached_property
    def image_height(self) -> npt.NDArray[np.int32]:
        """int32 [I]."""
        return self.join("image_height")

    @cached_property
    def keys(self) -> npt.NDArray[np.str_]:
        """str [S]."""
        return self.join("keys")
