"""Indexes in memory for tests: made of numbers, or of a real one with some numbers changed."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from data_pipeline.index import Index
from data_pipeline.index.columns import OF_IMAGES, OF_SAMPLES
from data_pipeline.storage import Shard


def make_index(
    text_tokens: Sequence[int],
    images: Sequence[Sequence[tuple[int, int]]],
    shard_sizes: Sequence[int] | None = None,
) -> Index:
    """An index of samples with these numbers of text tokens and (width, height) of images."""
    sizes = [size for sample in images for size in sample]
    shard_sizes = [len(text_tokens)] if shard_sizes is None else shard_sizes
    return Index.from_columns(
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
    return Index.from_columns(
        index.shards,
        index.sizes.tolist(),
        index.keys.tolist(),
        fingerprint=index.fingerprint,
        **{**{name: index.join(name) for name in names}, **columns},
    )
