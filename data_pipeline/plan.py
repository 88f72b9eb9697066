"""Which samples go into which pack of which step, and how many tokens each of their images gets.

The plan is a pure function of (index, settings, seed, epoch): nothing is read or decoded, and the
world size plays no part. An epoch is a permutation of the samples, cut into windows; a window and
what the one before left over are packed together, and their packs dealt into steps.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from data_pipeline.draw import DrawnSamples, SampleDrawer, TokenCountSettings, uniform_hash
from data_pipeline.errors import InputError
from data_pipeline.index import Index
from data_pipeline.packing import Packer, best_fit
from data_pipeline.tiling import TilingSettings


class PackSettings(BaseModel):
    """How samples become packs, and packs become steps."""

    model_config = ConfigDict(extra="forbid")

    max_tokens: int = Field(8192, gt=0)
    """Tokens a pack can hold."""
    packs_per_step: int = Field(gt=0)
    """Packs of one optimizer step, over all ranks; the world size must divide it."""
    window_samples: int = Field(20_000, gt=0)
    """Samples that are packed together; more fill packs better and cost more at once."""


@dataclass(frozen=True)
class PlanState:
    """A place in the plan: step `step` of window `window` of epoch `epoch` comes next.

    `carry` holds the ids of the samples that the window before left over for this one.
    """

    epoch: int = 0
    window: int = 0
    step: int = 0
    carry: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self) | {"carry": list(self.carry)}

    @classmethod
    def from_dict(cls, state: Any) -> "PlanState":
        """The inverse of `to_dict`; InputError if it is not such a dictionary."""
        expected = {"epoch", "window", "step", "carry"}
        if not isinstance(state, dict) or set(state) != expected:
            found = sorted(state) if isinstance(state, dict) else type(state).__name__
            raise InputError(f"a plan state has the keys {sorted(expected)}, found {found}")
        if not isinstance(state["carry"], list | tuple):
            raise InputError(f"carry of a plan state must be a list, found {state['carry']!r}")
        for value in (state["epoch"], state["window"], state["step"], *state["carry"]):
            if type(value) is not int or value < 0:
                raise InputError(f"a plan state holds integers from 0 on, found {value!r}")
        return cls(state["epoch"], state["window"], state["step"], tuple(state["carry"]))


@dataclass(frozen=True)
class PackPlan:
    """One pack: its samples, and the grid side n of each of their images.

    sample_ids: int64 [S]; S is 0 for an empty stand-in.
    sides: per sample, int64 [images of the sample].
    tokens: length of the pack, image tokens included.
    """

    sample_ids: np.ndarray
    sides: tuple[np.ndarray, ...]
    tokens: int

    @classmethod
    def empty(cls) -> "PackPlan":
        """A pack without samples, for a rank that has nothing to do while others do."""
        return cls(np.empty(0, dtype=np.int64), (), 0)


@dataclass(frozen=True)
class StepPlan:
    """The packs of one optimizer step over all ranks; rank r of w takes `packs[r::w]`."""

    epoch: int
    window: int
    step: int
    packs: tuple[PackPlan, ...]


class Planner:
    """Plans the epochs of one index.

    Attributes:
        too_long: (sample id, tokens) of samples that are left out since they do not fit into a
            pack even at the smallest trained token count.
        packs_per_step: packs of every step.
        windows_per_epoch: an epoch is planned in so many parts.

    Raises:
        InputError: no sample fits into a pack.
    """

    def __init__(
        self,
        index: Index,
        tiling: TilingSettings,
        counts: TokenCountSettings,
        pack: PackSettings,
        seed: int,
        packer: Packer = best_fit,
    ) -> None:
        self._counts, self._pack, self._seed, self._packer = counts, pack, seed, packer
        self._samples = SampleDrawer(index, tiling, counts, pack.max_tokens, seed)
        self._eligible, self.too_long = self._samples.eligible, self._samples.too_long
        if not len(index):
            raise InputError("the index holds no samples: there is nothing to plan")
        if not len(self._eligible):
            shortest = min(tokens for _, tokens in self.too_long)
            raise InputError(
                f"none of the {len(index)} samples fits into a pack of {pack.max_tokens} tokens, "
                f"the shortest has {shortest}; raise data.pack.max_tokens"
            )
        self.packs_per_step = pack.packs_per_step
        self.windows_per_epoch = -(-len(self._eligible) // pack.window_samples)

    def steps(self, state: PlanState | None = None) -> Iterator[tuple[StepPlan, PlanState]]:
        """The steps from `state` on (default: the beginning), without end.

        Yields:
            A step, and the state after it: `steps` of that state goes on with the next one.

        Raises:
            InputError: the state cannot be one of this plan.
        """
        state = state or PlanState()
        if (
            state.window >= self.windows_per_epoch
            or (state.carry and not state.window)
            or not np.isin(np.array(state.carry, dtype=np.int64), self._eligible).all()
        ):
            raise _foreign_state(state)
        return self._steps(state)

    def evaluation_packs(self, side: int) -> list[PackPlan]:
        """Every sample of the index exactly once, with all images at grid side `side`.

        Best fit over the whole index; samples and packs are in its order. A sample longer than
        max_tokens gets a pack of its own: which samples are scored must not depend on the side.
        """
        samples = self._samples.at_side(side)
        # A length of max_tokens leaves no room for another sample.
        lengths = np.minimum(samples.lengths, self._pack.max_tokens)
        packs = self._packer(lengths, self._pack.max_tokens)
        return [_pack_plan(samples, items) for items in sorted(sorted(items) for items in packs)]

    def _steps(self, state: PlanState) -> Iterator[tuple[StepPlan, PlanState]]:
        order_epoch, order = state.epoch, self._order(state.epoch)
        while True:
            if state.epoch != order_epoch:
                order_epoch, order = state.epoch, self._order(state.epoch)
            samples, packs, left_over = self._pack_window(order, state)
            steps = _whole_steps(packs, self.packs_per_step)
            if state.step and state.step >= len(steps):
                raise _foreign_state(state)
            following = PlanState(state.epoch, state.window + 1, 0, left_over)
            if following.window == self.windows_per_epoch:
                following = PlanState(state.epoch + 1)
            while state.step < len(steps):
                plan = tuple(_pack_plan(samples, items) for items in steps[state.step])
                step = StepPlan(state.epoch, state.window, state.step, plan)
                state = replace(state, step=state.step + 1)
                yield step, state if state.step < len(steps) else following
            state = following

    def _order(self, epoch: int) -> np.ndarray:
        """The eligible samples in the order of this epoch, int64 [E]; ties go by sample id."""
        keys = uniform_hash(self._seed, "order", epoch, self._eligible)
        return self._eligible[np.argsort(keys, kind="stable")]

    def _pack_window(
        self, order: np.ndarray, state: PlanState
    ) -> tuple[DrawnSamples, list[list[int]], tuple[int, ...]]:
        """Pack one window: (its samples, the items of each pack, ids left over for the next).

        The packs make whole steps. In an epoch's last window nothing is left over: more packs, of
        samples from the head of the epoch's order, complete the last step.
        """
        size = self._pack.window_samples
        in_order = order[state.window * size : (state.window + 1) * size]
        ids = np.concatenate([np.array(state.carry, dtype=np.int64), in_order])
        samples = self._samples.draw(state.epoch, ids)
        packs = self._pack_groups(samples)
        # A packer sorts by size; a step made of its neighbours would hold samples all alike.
        keys = uniform_hash(self._seed, "packs", state.epoch, state.window, np.arange(len(packs)))
        packs = [packs[i] for i in np.argsort(keys, kind="stable")]
        surplus = len(packs) % self.packs_per_step
        if not surplus:
            return samples, packs, ()
        if state.window < self.windows_per_epoch - 1:
            left_over = [i for items in packs[-surplus:] for i in items]
            return samples, packs[:-surplus], tuple(ids[left_over].tolist())
        filler, more = self._filler(order, state.epoch, self.packs_per_step - surplus)
        packs += [[len(ids) + i for i in items] for items in more]
        return self._samples.draw(state.epoch, np.concatenate([ids, filler])), packs, ()

    def _filler(
        self, order: np.ndarray, epoch: int, num_packs: int
    ) -> tuple[np.ndarray, list[list[int]]]:
        """(ids, items of each pack) for `num_packs` packs from the head of the epoch's order.

        Samples repeat where the epoch has too few.
        """
        lengths = self._samples.draw(epoch, order[: self._pack.window_samples]).lengths
        # One pack more for each group, since the last of a group is seldom full.
        enough = (num_packs + len(self._counts.counts)) * self._pack.max_tokens
        rounds = -(-enough // int(lengths.sum()))
        stop = np.searchsorted(np.cumsum(np.tile(lengths, rounds)), enough) + 1
        ids = np.tile(order[: len(lengths)], rounds)[:stop]
        samples = self._samples.draw(epoch, ids)
        packs = self._pack_groups(samples)
        fullest = sorted(packs, key=lambda items: -int(samples.lengths[items].sum()))
        return ids, fullest[:num_packs]

    def _pack_groups(self, samples: DrawnSamples) -> list[list[int]]:
        """Pack each group by itself; items per pack."""
        packs: list[list[int]] = []
        for group in np.unique(samples.groups):
            members = np.flatnonzero(samples.groups == group)
            for items in self._packer(samples.lengths[members], self._pack.max_tokens):
                packs.append(members[items].tolist())
        return packs


def _pack_plan(samples: DrawnSamples, items: list[int]) -> PackPlan:
    first = samples.image_start[items].tolist()
    last = samples.image_start[np.array(items) + 1].tolist()
    return PackPlan(
        sample_ids=samples.ids[items],
        sides=tuple(samples.sides[a:b] for a, b in zip(first, last, strict=True)),
        tokens=int(samples.lengths[items].sum()),
    )


def _whole_steps(packs: list[list[int]], size: int) -> list[list[list[int]]]:
    return [packs[i : i + size] for i in range(0, len(packs), size)]


def _foreign_state(state: PlanState) -> InputError:
    return InputError(
        f"the saved place in the data (epoch {state.epoch}, window {state.window}, step "
        f"{state.step}, {len(state.carry)} samples carried over) is not one of this plan: the data "
        "or their settings are not those of the run that saved it"
    )
