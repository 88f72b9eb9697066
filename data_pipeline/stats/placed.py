"""The placed samples of planned windows as arrays: what statistics and charts are made of."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.plan.parts import WindowPlan
from data_pipeline.plan.window_samples import Drawn
from data_pipeline.stats.measures import Measures, SampleCosts, measure


@dataclass(frozen=True)
class Placed:
    """S samples that were placed into packs, all copies of a sample together.

    ids, tokens, tiles, images: int64 [S]; ids of the mixture; images without their copies.
    pairs: int64 [S], sum of the squared lengths of the copies, what attention costs.
    flops: float64 [S]. sides: int64 [images of all copies], n of each image.
    pack: int64 [S]; pack k is in step k // packs_per_step.
    """

    ids: np.ndarray
    tokens: np.ndarray
    tiles: np.ndarray
    images: np.ndarray
    pairs: np.ndarray
    flops: np.ndarray
    sides: np.ndarray
    pack: np.ndarray
    num_steps: int
    packs_per_step: int

    @classmethod
    def of(cls, windows: Sequence[WindowPlan], max_steps: int | None = None) -> "Placed":
        """The samples of at least one window's steps, or of the first `max_steps` of them."""
        steps = sum(window.num_steps for window in windows)
        steps = steps if max_steps is None else min(steps, max_steps)
        packs_per_step = windows[0].packs_per_step
        packs, begin = [], 0
        for window in windows:
            packs.append(np.where(window.pack >= 0, window.pack + begin, -1))
            begin += window.num_steps * packs_per_step
        pack = np.concatenate(packs)
        placed = (pack >= 0) & (pack < steps * packs_per_step)
        images = np.concatenate([np.diff(window.samples.image_start) for window in windows])
        drawn = [window.drawn for window in windows]
        copies = np.concatenate([one.copies for one in drawn])
        sides = np.concatenate([one.sides for one in drawn])
        tiles = np.concatenate([window.samples.tiles for window in windows])
        return cls(
            ids=np.concatenate([window.samples.ids for window in windows])[placed],
            tokens=np.concatenate([one.lengths for one in drawn])[placed],
            tiles=(tiles * copies)[placed],
            images=images[placed],
            pairs=np.concatenate([_pairs(one) for one in drawn])[placed],
            flops=np.concatenate([window.flops for window in windows])[placed],
            sides=sides[np.repeat(placed, images * copies)],
            pack=pack[placed],
            num_steps=steps,
            packs_per_step=packs_per_step,
        )

    def __len__(self) -> int:
        return len(self.ids)

    def per_pack(self, values: np.ndarray) -> np.ndarray:
        """Sums over the samples of each pack, float64 [num_steps, packs_per_step]."""
        size = self.num_steps * self.packs_per_step
        sums = np.bincount(self.pack, weights=values, minlength=size)
        return sums.reshape(self.num_steps, self.packs_per_step)

    def measures(self, max_tokens: int) -> Measures:
        """Padding, balance and composition of the steps."""
        samples = SampleCosts(self.tokens, self.tiles, self.flops, self.pairs)
        return measure(samples, self.pack, self.packs_per_step, self.num_steps, max_tokens)


def _pairs(drawn: Drawn) -> np.ndarray:
    squares = np.concatenate([[0], np.cumsum(drawn.copy_lengths**2)])
    return np.diff(squares[drawn.copy_start])
