"""Packs for evaluation: every sample exactly once, at one token count."""

import numpy as np

from data_pipeline.balance.fit import best_fit
from data_pipeline.draw import uniform_hash
from data_pipeline.mixture import Mixture, make_ids
from data_pipeline.plan.parts import PackPlan
from data_pipeline.plan.window_samples import gather
from data_pipeline.tiling import TilingSettings


class EvaluationPlan:
    """Packs all samples of a mixture, which stay in memory: for sets of an evaluation's size.

    Or `max_samples` of them (0: all), the same ones in every run.
    """

    def __init__(
        self, mixture: Mixture, tiling: TilingSettings, max_tokens: int, max_samples: int = 0
    ) -> None:
        sizes = [len(dataset.index) for dataset in mixture.datasets]
        every = np.concatenate([make_ids(i, np.arange(n)) for i, n in enumerate(sizes)])
        if max_samples:  # whatever their order: it may go by kind; of fewer, each is among more
            first = np.argsort(uniform_hash(0, "evaluation", every), kind="stable")[:max_samples]
            every = every[np.sort(first)]
        self.mixture = mixture
        self._samples = gather(mixture, tiling, every, np.zeros(len(every), np.int64))
        self._max_tokens = max_tokens

    @property
    def samples(self) -> list[int]:
        """The ids of all samples, in order."""
        return self._samples.ids.tolist()

    def packs(self, side: int) -> list[PackPlan]:
        """Every sample once, with all images at grid side `side`; samples and packs in order.

        Best fit over all. A sample longer than max_tokens gets a pack of its own: which samples
        are scored must not depend on the side.
        """
        lengths = self._samples.lengths_at(side)
        # A length of max_tokens leaves no room for another sample.
        pack_of = best_fit(np.minimum(lengths, self._max_tokens), self._max_tokens)
        packs: list[list[int]] = [[] for _ in range(int(pack_of.max(initial=-1)) + 1)]
        for item, pack in enumerate(pack_of.tolist()):
            packs[pack].append(item)
        return [self._pack(items, lengths, side) for items in packs]

    def _pack(self, items: list[int], lengths: np.ndarray, side: int) -> PackPlan:
        starts, tiles = self._samples.image_start, self._samples.image_tiles
        own = tuple(tiles[starts[i] : starts[i + 1]] for i in items)
        sides = tuple(np.full(len(images), side) for images in own)
        return PackPlan(self._samples.ids[items], lengths[items], sides, own)
