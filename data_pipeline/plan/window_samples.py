"""The samples of a window as arrays, and what an epoch draws for them."""

from dataclasses import dataclass

import numpy as np

from data_pipeline.draw import TokenCountSettings, draw_sides, uniform_hash
from data_pipeline.mixture import Mixture, split_ids
from data_pipeline.tiling import TilingSettings, count_tiles


@dataclass(frozen=True)
class WindowSamples:
    """S samples with I images, from the indexes alone.

    ids: int64 [S]. epochs: int64 [S], of each sample's dataset. keys: uint64 [S], the address of
    its dataset's draws. numbers: int64 [S], in the dataset's index. text_tokens: int64 [S].
    image_start: int64 [S+1]; the images of sample i are image_start[i] .. image_start[i+1].
    image_tiles: int64 [I].
    """

    ids: np.ndarray
    epochs: np.ndarray
    keys: np.ndarray
    numbers: np.ndarray
    text_tokens: np.ndarray
    image_start: np.ndarray
    image_tiles: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tiles(self) -> np.ndarray:
        """Tiles of each sample, int64 [S]."""
        before = np.concatenate([[0], np.cumsum(self.image_tiles)])
        return np.diff(before[self.image_start])

    def lengths_at(self, side: int) -> np.ndarray:
        """Tokens of each sample with every image at one side, int64 [S]."""
        return self.text_tokens + self.tiles * side**2

    def select(self, mask: np.ndarray) -> "WindowSamples":
        """The samples where a bool [S] mask is true."""
        counts = np.diff(self.image_start)
        return WindowSamples(
            ids=self.ids[mask],
            epochs=self.epochs[mask],
            keys=self.keys[mask],
            numbers=self.numbers[mask],
            text_tokens=self.text_tokens[mask],
            image_start=_starts(counts[mask]),
            image_tiles=self.image_tiles[np.repeat(mask, counts)],
        )


@dataclass(frozen=True)
class Drawn:
    """What was drawn for S samples: C copies of them, each at counts of its own, in one pack.

    lengths: int64 [S], tokens with image tokens, of all copies of a sample together.
    groups: int64 [S]; only samples of one group may share a pack.
    copy_start: int64 [S+1]; the copies of sample i are copy_start[i] .. copy_start[i+1].
    copy_lengths: int64 [C], tokens of each copy.
    side_start: int64 [C+1]; the images of copy c are side_start[c] .. side_start[c+1] in `sides`.
    sides: int64 [images of all copies], n of each image.
    """

    lengths: np.ndarray
    groups: np.ndarray
    copy_start: np.ndarray
    copy_lengths: np.ndarray
    side_start: np.ndarray
    sides: np.ndarray

    @property
    def copies(self) -> np.ndarray:
        """Copies of each sample, int64 [S]."""
        return np.diff(self.copy_start)

    @property
    def owner(self) -> np.ndarray:
        """The sample of each copy, int64 [C]."""
        return np.repeat(np.arange(len(self.lengths)), self.copies)


def gather(
    mixture: Mixture, tiling: TilingSettings, ids: np.ndarray, epochs: np.ndarray
) -> WindowSamples:
    """Look the samples up, shard by shard.

    Args:
        ids, epochs: int64 [S].
    """
    dataset, numbers = split_ids(ids)
    text_tokens = np.empty(len(ids), np.int64)
    counts = np.empty(len(ids), np.int64)
    shards = list(_by_shard(mixture, dataset, numbers))
    for index, shard, places in shards:
        columns, rows = index.columns(shard), numbers[places] - index.starts[shard]
        text_tokens[places] = columns.text_tokens[rows]
        counts[places] = columns.image_start[rows + 1] - columns.image_start[rows]
    image_start = _starts(counts)
    sizes = np.empty((2, image_start[-1]), np.int64)
    for index, shard, places in shards:
        columns, rows = index.columns(shard), numbers[places] - index.starts[shard]
        here = ranges(image_start[places], counts[places])
        there = ranges(columns.image_start[rows], counts[places])
        sizes[0, here] = columns.image_width[there]
        sizes[1, here] = columns.image_height[there]
    keys = np.array([d.key for d in mixture.datasets], dtype=np.uint64)
    return WindowSamples(
        ids=ids,
        epochs=epochs,
        keys=keys[dataset],
        numbers=numbers,
        text_tokens=text_tokens,
        image_start=image_start,
        image_tiles=count_tiles(sizes[0], sizes[1], tiling),
    )


def draw(
    samples: WindowSamples,
    counts: TokenCountSettings,
    max_tokens: int,
    seed: int,
    max_tiles: int | None = None,
) -> Drawn:
    """Settle the token counts of samples that fit into a pack at the smallest trained count."""
    if counts.schedule == "stochastic":
        return _stochastic(samples, counts, max_tokens, seed)
    return _nested(samples, counts, max_tokens, max_tiles)


def _stochastic(
    samples: WindowSamples, counts: TokenCountSettings, max_tokens: int, seed: int
) -> Drawn:
    """One copy of each sample, at drawn counts.

    A sample that does not fit has its images capped at the largest trained side at which it does.
    """
    owner = np.repeat(np.arange(len(samples)), np.diff(samples.image_start))  # [I]
    number = np.arange(len(owner)) - samples.image_start[owner]  # [I], image within its sample
    by_image = counts.draw == "image"
    address = (samples.keys, samples.epochs, samples.numbers)
    if by_image:
        address = (*(column[owner] for column in address), number)
    drawn = draw_sides(counts, uniform_hash(seed, "tokens", *address))
    sides = uncapped = drawn if by_image else drawn[owner]

    def lengths(sides: np.ndarray) -> np.ndarray:
        tokens = np.bincount(owner, weights=samples.image_tiles * sides**2, minlength=len(samples))
        return samples.text_tokens + tokens.astype(np.int64)

    cap = np.full(len(samples), max(counts.sides))
    total = lengths(sides)
    for side in counts.trained_sides[-2::-1]:  # below the largest, descending
        over = total > max_tokens
        if not over.any():
            break
        cap[over] = side
        sides = np.minimum(uncapped, cap[owner])
        total = lengths(sides)
    by_pack = counts.draw == "pack"
    groups = np.minimum(drawn, cap) if by_pack else np.zeros(len(samples), dtype=np.int64)
    single = np.arange(len(samples) + 1)
    return Drawn(total, groups, single, total, samples.image_start, sides)


def _nested(
    samples: WindowSamples, counts: TokenCountSettings, max_tokens: int, max_tiles: int | None
) -> Drawn:
    """A copy of each sample at every trained count, the smallest first; of text without images one.

    Where they do not all fit into one pack together, the copies at the largest counts are left out.
    """
    sides, tiles = np.array(counts.trained_sides), samples.tiles
    together = np.cumsum([samples.lengths_at(side) for side in sides], axis=0)  # [counts, S]
    fits = together <= max_tokens
    if max_tiles is not None:
        fits &= np.arange(1, len(sides) + 1)[:, None] * tiles <= max_tiles
    copies = np.where(tiles > 0, fits.sum(axis=0), 1)
    copy_start = _starts(copies)
    owner = np.repeat(np.arange(len(samples)), copies)  # [C]
    side = sides[np.arange(len(owner)) - copy_start[owner]]  # [C]
    images = np.diff(samples.image_start)[owner]
    return Drawn(
        lengths=together[copies - 1, np.arange(len(samples))],
        groups=np.zeros(len(samples), dtype=np.int64),
        copy_start=copy_start,
        copy_lengths=samples.text_tokens[owner] + tiles[owner] * side**2,
        side_start=_starts(images),
        sides=np.repeat(side, images),
    )


def _by_shard(mixture: Mixture, dataset: np.ndarray, numbers: np.ndarray):
    """(index, shard, places in the arrays) of every shard that samples come from."""
    for d in np.unique(dataset).tolist():
        index = mixture.datasets[d].index
        places = np.flatnonzero(dataset == d)
        shard = np.searchsorted(index.starts, numbers[places], side="right") - 1
        order = np.argsort(shard, kind="stable")
        found, first = np.unique(shard[order], return_index=True)
        for number, part in zip(found.tolist(), np.split(order, first[1:]), strict=True):
            yield index, number, places[part]


def _starts(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)])


def ranges(first: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """first[0] .. first[0] + counts[0], then first[1] .., one after the other; int64."""
    return np.repeat(first - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
