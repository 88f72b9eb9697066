"""What a plan is made of: windows, their steps, the packs of a step."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from data_pipeline.plan.state import PlanState
from data_pipeline.plan.window_samples import Drawn, WindowSamples, ranges


@dataclass(frozen=True)
class PackPlan:
    """One pack of S samples, or copies of samples at different token counts.

    sample_ids: int64 [S]; S is 0 for an empty stand-in.
    lengths: int64 [S], tokens of each, image tokens included.
    sides, tiles: per sample, int64 [images of the sample]; side n of each image's token grid, and
        the tiles it is cut into.
    flops: what the pack costs by the planner's model, forward and backward.
    copies: int64 [S], how many copies of each sample there are, one after the other, the one of the
        fewest tokens first; None: every sample is there once.
    """

    sample_ids: np.ndarray
    lengths: np.ndarray
    sides: tuple[np.ndarray, ...]
    tiles: tuple[np.ndarray, ...]
    flops: float = 0.0
    copies: np.ndarray | None = None

    @property
    def samples(self) -> list[range]:
        """The places of each different sample's copies."""
        if self.copies is None:
            return [range(i, i + 1) for i in range(len(self.sample_ids))]
        found, copies, place = [], self.copies.tolist(), 0
        while place < len(copies):
            found.append(range(place, place + copies[place]))
            place = found[-1].stop
        return found

    @property
    def tokens(self) -> int:
        """Length of the pack."""
        return int(self.lengths.sum())

    @property
    def num_tiles(self) -> int:
        """Image tiles of the pack."""
        return sum(int(tiles.sum()) for tiles in self.tiles)

    @classmethod
    def empty(cls) -> "PackPlan":
        """A pack without samples, for a rank that has nothing to do while others do."""
        return cls(np.empty(0, np.int64), np.empty(0, np.int64), (), ())


@dataclass(frozen=True)
class LeftOut:
    """A sample that fits into no pack, with its tokens at the smallest trained count."""

    sample: int
    tokens: int
    tiles: int


@dataclass(frozen=True)
class StepPlan:
    """The packs of one optimizer step over all ranks; rank r of w takes `packs[r::w]`.

    epochs: by dataset, how often its samples had been through when the window began.
    left_out: with the first step after they were met, the samples that fit into no pack.
    """

    window: int
    step: int
    packs: tuple[PackPlan, ...]
    epochs: tuple[float, ...] = (0.0,)
    left_out: tuple[LeftOut, ...] = ()

    @property
    def epoch(self) -> int:
        """Whole epochs that every dataset had been through."""
        return int(min(self.epochs))


@dataclass(frozen=True)
class WindowPlan:
    """A planned window: `samples`, `drawn`, `flops` [S]; `pack` [S], -1 where carried over.

    Packs k * packs_per_step .. (k + 1) * packs_per_step - 1 are step k. `state` is the window's
    beginning, `following` the next window's.
    """

    samples: WindowSamples
    drawn: Drawn
    flops: np.ndarray
    pack: np.ndarray
    num_steps: int
    packs_per_step: int
    state: PlanState
    following: PlanState
    epochs: tuple[float, ...]
    left_out: tuple[LeftOut, ...]

    def steps(self, first: int = 0) -> Iterator[tuple[StepPlan, PlanState]]:
        """Steps from `first` on, each with the state after it."""
        order = np.argsort(self.pack, kind="stable")
        bounds = np.searchsorted(
            self.pack[order], np.arange(self.num_steps * self.packs_per_step + 1)
        ).tolist()
        for step in range(first, self.num_steps):
            packs = tuple(
                self._pack(order[bounds[p] : bounds[p + 1]])
                for p in range(step * self.packs_per_step, (step + 1) * self.packs_per_step)
            )
            left_out = () if step else self.left_out
            plan = StepPlan(self.state.window, step, packs, self.epochs, left_out)
            last = step + 1 == self.num_steps
            yield plan, self.following if last else self.state.at_step(step + 1)

    def _pack(self, items: np.ndarray) -> PackPlan:
        drawn, first = self.drawn, self.drawn.copy_start[items]
        copies = drawn.copy_start[items + 1] - first
        owner, places = np.repeat(items, copies), ranges(first, copies)
        starts, ends = self.samples.image_start[owner], self.samples.image_start[owner + 1]
        parts = zip(starts.tolist(), ends.tolist(), strict=True)
        starts, ends = drawn.side_start[places], drawn.side_start[places + 1]
        sides = zip(starts.tolist(), ends.tolist(), strict=True)
        return PackPlan(
            sample_ids=self.samples.ids[owner],
            lengths=drawn.copy_lengths[places],
            sides=tuple(drawn.sides[start:end] for start, end in sides),
            tiles=tuple(self.samples.image_tiles[start:end] for start, end in parts),
            flops=float(self.flops[items].sum()),
            copies=np.repeat(copies, copies),
        )


def steps_of(
    windows: Iterable[WindowPlan], state: PlanState | None
) -> Iterator[tuple[StepPlan, PlanState]]:
    """The steps of windows, one after the other, from `state` on in the first."""
    first = state.step if state else 0
    for window in windows:
        yield from window.steps(first)
        first = 0
