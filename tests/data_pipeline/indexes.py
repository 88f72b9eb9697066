"""Indexes in memory for tests: made of numbers, or of a real one with some numbers changed."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.index import Index
from data_pipeline.index.columns import COLUMNS, OF_IMAGES, OF_SAMPLES, ShardColumns, join_keys
from data_pipeline.storage import Shard


def index_of(
    shards: Sequence[Shard] = (Shard("memory.tar"),),
    sizes: Sequence[int] | None = None,
    keys: Sequence[str] | None = None,
    *,
    fingerprint: str = "",
    **columns: npt.ArrayLike,
) -> Index:
    """An index of arrays in memory: `text_tokens`, and any of the other whole-set columns.

    `sizes` are the samples of each shard (default: all in the first). What is not given is zero;
    `image_start` must come with columns of images.
    """
    whole = _filled(columns, keys)
    num_samples = len(whole["text_tokens"])
    sizes = [num_samples, *[0] * (len(shards) - 1)] if sizes is None else sizes
    starts = np.cumsum([0, *sizes])
    assert starts[-1] == num_samples and len(starts) == len(shards) + 1, "sizes do not fit"

    def load(shard: int) -> ShardColumns:
        return _part(whole, int(starts[shard]), int(starts[shard + 1]))

    return Index(shards, sizes, len(whole["image_width"]), load, fingerprint=fingerprint)


def _filled(
    columns: Mapping[str, npt.ArrayLike], keys: Sequence[str] | None
) -> dict[str, npt.NDArray[Any]]:
    """Whole-set columns, zeros where nothing is given."""
    given = {name: np.asarray(values, dtype=COLUMNS[name]) for name, values in columns.items()}
    num_samples = len(given["text_tokens"])
    whole = {name: np.zeros(num_samples, COLUMNS[name]) for name in OF_SAMPLES}
    whole["image_start"] = np.zeros(num_samples + 1, np.int64)
    num_images = len(given.get("image_width", ()))
    whole |= {name: np.zeros(num_images, COLUMNS[name]) for name in OF_IMAGES}
    keys = [str(i) for i in range(num_samples)] if keys is None else keys
    return whole | given | {"keys": np.array(keys, dtype=np.str_)}


def _part(whole: dict[str, npt.NDArray[Any]], first: int, last: int) -> ShardColumns:
    image_start = whole["image_start"][first : last + 1]
    images = slice(image_start[0], image_start[-1])
    return ShardColumns(
        image_start=image_start - image_start[0],
        key_text=join_keys(whole["keys"][first:last].tolist()),
        **{name: whole[name][first:last] for name in OF_SAMPLES},
        **{name: whole[name][images] for name in OF_IMAGES},
    )


def make_index(
    text_tokens: Sequence[int],
    images: Sequence[Sequence[tuple[int, int]]],
    shard_sizes: Sequence[int] | None = None,
) -> Index:
    """An index of samples with these numbers of text tokens and (width, height) of images."""
    sizes = [size for sample in images for size in sample]
    shard_sizes = [len(text_tokens)] if shard_sizes is None else shard_sizes
    return index_of(
        [Shard(f"{number}.tar") for number in range(len(shard_sizes))],
        shard_sizes,
        [f"s{i}" for i in range(len(text_tokens))],
        text_tokens=text_tokens,
        supervised_tokens=np.ones(len(text_tokens)),
        image_start=np.cumsum([0, *map(len, images)]),
        image_width=[width for width, _ in sizes],
        image_height=[height for _, height in sizes],
    )


def random_index(
    num_samples: int, seed: int = 0, max_images: int = 3, shard_sizes: Sequence[int] | None = None
) -> Index:
    """Texts of 5 to 40 tokens, images that are one or two tiles at `max_tiles=2`."""
    rng = np.random.default_rng(seed)
    texts = rng.integers(5, 41, num_samples).tolist()
    counts = rng.integers(0, max_images + 1, num_samples)
    shapes = [(16, 16), (32, 16)]
    images = [[shapes[rng.integers(2)] for _ in range(count)] for count in counts]
    return make_index(texts, images, shard_sizes)


def replaced(index: Index, **columns: npt.ArrayLike) -> Index:
    """A copy in memory with some whole-set columns replaced; reads the same shards."""
    names = [*OF_SAMPLES, *OF_IMAGES, "image_start"]
    return index_of(
        index.shards,
        index.sizes.tolist(),
        index.keys.tolist(),
        fingerprint=index.fingerprint,
        **{**{name: index.join(name) for name in names}, **columns},
    )
