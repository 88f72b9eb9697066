"""Several indexed datasets as one: whose sample is it, and how often each comes.

A sample's id is its dataset's number times 2^40 plus its number in that dataset's index, so ids of
one dataset do not depend on the others' sizes; with one dataset they are the index's own numbers.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from pydantic import Field

from data_pipeline.config_file import Settings
from data_pipeline.errors import InputError
from data_pipeline.index import BadSample, Index
from data_pipeline.paths import PathText

_SHIFT = 40
_LOCAL = (1 << _SHIFT) - 1
SINGLE = "data"
"""Name of the only dataset where `data.shards` is given."""


class DatasetSettings(Settings):
    """One dataset of a mixture."""

    shards: list[PathText] = Field(min_length=1)
    """Folders of *.tar files, globs, brace patterns or URLs, indexed by `data_pipeline.index`."""
    weight: float | None = Field(None, gt=0)
    """Share of the samples, relative to the other datasets'; null: its number of samples."""
    repeat: float | None = Field(None, gt=0)
    """Epochs after which it ends, and the others go on alone; null: never."""


@dataclass(frozen=True)
class Dataset:
    """A named index; `weight` and `repeat` as in `DatasetSettings`."""

    name: str
    index: Index
    weight: float | None = None
    repeat: float | None = None

    @property
    def limit(self) -> int | None:
        """Samples after which the dataset has ended, all epochs together; None: never."""
        return None if self.repeat is None else max(1, round(self.repeat * len(self.index)))

    @cached_property
    def key(self) -> int:
        """An integer made of the name: the address of everything drawn for this dataset."""
        return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:8], "little")


class Mixture:
    """Datasets that are trained on together.

    Attributes:
        datasets: in the order given.
        weights: float64 [D], summing to 1.

    Raises:
        InputError: two datasets of one name, an empty one, or weights for some of them only.
    """

    def __init__(self, datasets: Sequence[Dataset]) -> None:
        self.datasets = tuple(datasets)
        names = [dataset.name for dataset in datasets]
        if not names or len(set(names)) < len(names):
            raise InputError(f"a mixture needs datasets of different names, found {names}")
        for dataset in datasets:
            if not len(dataset.index):
                raise InputError(f"the index of {dataset.name} holds no samples: nothing to plan")
        given = [dataset.weight for dataset in datasets]
        if None in given and any(weight is not None for weight in given):
            raise InputError(
                f"weights are given for some datasets only ({dict(zip(names, given, strict=True))})"
                "; give one to each, or none: then each counts by its number of samples"
            )
        weights = np.array([d.weight or len(d.index) for d in datasets], dtype=np.float64)
        self.weights = weights / weights.sum()

    def limits(self, epochs: float | None) -> list[int | None]:
        """Samples after which each dataset has ended; None: never.

        epochs: of the mixture, in each of which a dataset comes `repeat` times, or once; None: each
            by itself, as `Dataset.limit`.

        Raises:
            InputError: weights mix the datasets without end, so that there are no epochs.
        """
        if epochs is None:
            return [dataset.limit for dataset in self.datasets]
        endless = [d.name for d in self.datasets if d.weight is not None and d.repeat is None]
        if endless and len(self.datasets) > 1:
            raise InputError(
                f"train.epochs={epochs:g}, but {', '.join(endless)} are mixed by their weight "
                "without end, so no epoch ends: give each a data.datasets.*.repeat (how often it "
                "comes in an epoch), leave out the weights, or give train.steps instead"
            )
        return [replace(d, repeat=epochs * (d.repeat or 1)).limit for d in self.datasets]

    @classmethod
    def of(cls, index: Index) -> "Mixture":
        """A single dataset."""
        return cls([Dataset(SINGLE, index)])

    def __len__(self) -> int:
        return sum(len(dataset.index) for dataset in self.datasets)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the datasets."""
        return tuple(dataset.name for dataset in self.datasets)

    @property
    def bad(self) -> list[BadSample]:
        """The samples that the indexes left out."""
        return [bad for dataset in self.datasets for bad in dataset.index.bad]

    @property
    def store_retries(self) -> int:
        """Requests to stores that this process has tried again so far."""
        storages = {dataset.index.storage for dataset in self.datasets}
        return sum(storage.counts.retries for storage in storages)

    def dataset(self, sample: int) -> int:
        """Number of the dataset a sample belongs to."""
        return sample >> _SHIFT

    def name(self, sample: int) -> str:
        """ "shard-file:key" of a sample, with its dataset's name where there are several."""
        index, local = self._locate(sample)
        prefix = f"{self.names[sample >> _SHIFT]}/" if len(self.datasets) > 1 else ""
        return prefix + index.name(local)

    def bad_sample(self, sample: int, reason: str) -> BadSample:
        """A sample that could not be used, as the log names it."""
        shard, _, key = self.name(sample).partition(":")
        return BadSample(shard, key, reason)

    def supervised_tokens(self, sample: int) -> int:
        """Supervised tokens of a sample, as indexed."""
        index, local = self._locate(sample)
        shard = int(np.searchsorted(index.starts, local, side="right")) - 1
        return int(index.columns(shard).supervised_tokens[local - index.starts[shard]])

    def read(self, sample: int) -> tuple[dict[str, Any], list[bytes]]:
        """`read_sample` and `read_images` at once; see `Index.read`."""
        index, local = self._locate(sample)
        return index.read(local)

    def read_sample(self, sample: int) -> dict[str, Any]:
        """Messages and metadata; InputError if they are not what was indexed."""
        index, local = self._locate(sample)
        return index.read_sample(local)

    def read_images(self, sample: int) -> list[bytes]:
        """Image files in reading order; InputError if they are not what was indexed."""
        index, local = self._locate(sample)
        return index.read_images(local)

    def image_sizes(self, sample: int) -> np.ndarray:
        """int64 [images, 2], width and height in pixels as indexed."""
        index, local = self._locate(sample)
        return index.image_sizes(local)

    def fingerprint(self) -> dict[str, Mapping[str, Any]]:
        """What the order of samples depends on, by dataset."""
        return {
            d.name: {
                "shards": d.index.fingerprint,
                "weight": float(weight) if len(self.datasets) > 1 else 1.0,
                "repeat": d.repeat,
            }
            for d, weight in zip(self.datasets, self.weights, strict=True)
        }

    def _locate(self, sample: int) -> tuple[Index, int]:
        return self.datasets[sample >> _SHIFT].index, sample & _LOCAL


def make_ids(dataset: int | np.ndarray, local: np.ndarray) -> np.ndarray:
    """Ids of samples by their numbers in their dataset's index, int64 of the same shape."""
    return (np.asarray(dataset, dtype=np.int64) << _SHIFT) + local.astype(np.int64)


def split_ids(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(number of the dataset, number in its index) of each id."""
    return ids >> _SHIFT, ids & _LOCAL
