"""Which samples go into which pack of which step, and how many tokens each of their images gets.

The plan is a pure function of (indexes, settings, seed): nothing is read or decoded, and the world
size plays no part. Every dataset is an endless stream of epochs; a window takes its quota from
each, joins what the window before left over, and is packed and balanced as a whole.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

import numpy as np

from data_pipeline.balance import DEFAULT_COST, CostModel, Packing, balance
from data_pipeline.balance.carry import Columns, after_carried, left_over
from data_pipeline.draw import TokenCountSettings, uniform_hash
from data_pipeline.errors import InputError
from data_pipeline.mixture import Mixture, make_ids, split_ids
from data_pipeline.plan.pack_settings import PackSettings
from data_pipeline.plan.parts import LeftOut, StepPlan, WindowPlan, steps_of
from data_pipeline.plan.state import PlanState
from data_pipeline.plan.streams import Stream
from data_pipeline.plan.window_samples import Drawn, WindowSamples, draw, gather
from data_pipeline.tiling import TilingSettings

PLAN_VERSION = 3
"""Raise it when the same data and settings would be planned differently: no resume across it."""


class Planner:
    """Plans a mixture, window after window.

    Args:
        mixture: what is trained on.
        tiling, counts, pack: the settings of their names.
        seed: of the run.
        cost: what a pack costs, to be the same in all packs of a step.
        epochs: after which the plan ends; None: where every dataset has a limit of repeats.
    """

    def __init__(
        self,
        mixture: Mixture,
        tiling: TilingSettings,
        counts: TokenCountSettings,
        pack: PackSettings,
        seed: int,
        cost: CostModel = DEFAULT_COST,
        epochs: float | None = None,
    ) -> None:
        self.limits = mixture.limits(epochs)
        self.mixture, self.packs_per_step = mixture, pack.packs_per_step
        self._tiling, self._counts, self._pack = tiling, counts, pack
        self._seed, self._cost = seed, cost
        self._window_samples = min(pack.window_samples, len(mixture))
        self._streams = [Stream(d, seed, self._window_samples) for d in mixture.datasets]
        self._plan = lru_cache(maxsize=1)(self._plan_window)

    def check(self) -> None:
        """Plan the first window, and keep it; InputError if no sample fits into a pack."""
        next(self.windows(), None)

    def steps(self, state: PlanState | None = None) -> Iterator[tuple[StepPlan, PlanState]]:
        """The steps from `state` on (default: the beginning).

        Without end, unless every dataset has a limit; the last step then holds what is
        left, and may have empty packs.

        Yields:
            A step, and the state after it: `steps` of that state goes on with the next one.

        Raises:
            InputError: the state is not one of this plan, or no sample fits into a pack.
        """
        return steps_of(self.windows(state), state)

    def windows(self, state: PlanState | None = None) -> Iterator[WindowPlan]:
        """The windows from the one of `state` on, as in `steps`.

        One without a step is skipped, unless it is the last and there are samples to name that fit
        into no pack.
        """
        state = self._checked(state or PlanState())
        barren = 0
        left_out: tuple[LeftOut, ...] = ()
        while (quotas := self.quotas(state)).any() or state.carry:
            window = self._plan(state.at_step(0))
            if state.step and state.step >= window.num_steps:
                raise _foreign(state)
            left_out += window.left_out
            barren = 0 if len(window.samples) else barren + int(quotas.sum())
            if barren >= len(self.mixture):
                raise self._nothing_fits(left_out)
            if window.num_steps:
                yield replace(window, left_out=left_out)
                left_out = ()
            state = window.following
        if left_out:
            yield replace(window, left_out=left_out)

    def quotas(self, state: PlanState) -> np.ndarray:
        """Samples that the window takes from each dataset, int64 [D]; 0 from one that has ended.

        Shares are rounded so that over many windows each dataset gets its weight.
        """
        left = self._left(state)
        active = left > 0
        if not active.any():
            return np.zeros(len(left), np.int64)
        shares = np.where(active, self.mixture.weights, 0.0)
        place = uniform_hash(self._seed, "quota", state.window)
        ends = np.floor(np.cumsum(shares / shares.sum()) * self._window_samples + place)
        ends[np.flatnonzero(active)[-1] :] = self._window_samples  # whatever the rounding
        return np.minimum(np.diff(ends, prepend=0).astype(np.int64), left)

    def _left(self, state: PlanState) -> np.ndarray:
        """Samples that each dataset still has to give, int64 [D]; enough where there is no end."""
        return np.array(
            [
                self._window_samples if limit is None else max(0, limit - taken)
                for limit, taken in zip(self.limits, state.taken, strict=True)
            ],
            dtype=np.int64,
        )

    def _plan_window(self, state: PlanState) -> WindowPlan:
        quotas = self.quotas(state)
        taken = tuple(t + q for t, q in zip(state.taken, quotas.tolist(), strict=True))
        following = PlanState(state.window + 1, 0, state.datasets, taken)
        ids, epochs = self._take(state, quotas)
        samples = gather(self.mixture, self._tiling, ids, epochs)
        fits = self._fits(samples)
        left_out = tuple(
            LeftOut(sample, tokens, tiles)
            for sample, tokens, tiles in zip(
                samples.ids[~fits].tolist(),
                self._shortest(samples)[~fits].tolist(),
                samples.tiles[~fits].tolist(),
                strict=True,
            )
        )
        samples = samples.select(fits)
        limits = self._pack
        drawn = draw(samples, self._counts, limits.max_tokens, self._seed, limits.max_tiles)
        first = int(fits[: len(state.carry)].sum())
        last = not self._left(following).any()
        of_copies = self._cost.flops(drawn.copy_lengths, samples.tiles[drawn.owner])
        flops = np.bincount(drawn.owner, weights=of_copies, minlength=len(samples))
        pack, num_steps = self._packs(samples, drawn, flops, first, last, state.window)
        carried, carried_epochs = left_over(pack, (samples.ids, samples.epochs))
        dataset, numbers = split_ids(carried)
        rows = (dataset.tolist(), carried_epochs.tolist(), numbers.tolist())
        return WindowPlan(
            samples=samples,
            drawn=drawn,
            flops=flops,
            pack=pack,
            num_steps=num_steps,
            packs_per_step=self.packs_per_step,
            state=state,
            following=replace(following, carry=tuple(zip(*rows, strict=True))),
            epochs=tuple(t / s.size for t, s in zip(state.taken, self._streams, strict=True)),
            left_out=left_out,
        )

    def _take(self, state: PlanState, quotas: np.ndarray) -> Columns:
        """(ids, epochs) of the window: what was carried over, then the new ones shuffled."""
        ids, epochs, draws = [], [], []
        for number, (stream, taken) in enumerate(zip(self._streams, state.taken, strict=True)):
            samples, own = stream.take(taken, int(quotas[number]))
            key = self.mixture.datasets[number].key
            ids.append(make_ids(number, samples))
            epochs.append(own)
            draws.append(uniform_hash(self._seed, "window", key, own, samples))
        order = np.argsort(np.concatenate(draws), kind="stable")
        carry = np.array(state.carry, dtype=np.int64).reshape(-1, 3)
        return after_carried(
            (make_ids(carry[:, 0], carry[:, 2]), carry[:, 1]),
            (np.concatenate(ids)[order], np.concatenate(epochs)[order]),
        )

    def _packs(
        self,
        samples: WindowSamples,
        drawn: Drawn,
        flops: np.ndarray,
        first: int,
        last: bool,
        window: int,
    ) -> tuple[np.ndarray, int]:
        """(pack of each sample or -1, number of steps); the first `first` were carried over."""
        tiles, groups = samples.tiles * drawn.copies, np.unique(drawn.groups)

        def balanced(members: np.ndarray, packs_per_step: int) -> Packing:
            return balance(
                drawn.lengths[members],
                tiles[members],
                flops[members],
                self._pack.max_tokens,
                packs_per_step,
                max_tiles=self._pack.max_tiles,
                first=int((members < first).sum()),
                last=last,
                seed=self._seed + window,
            )

        if len(groups) <= 1:
            packing = balanced(np.arange(len(samples)), self.packs_per_step)
            return packing.pack, packing.num_steps
        # A pack may hold samples of one group only: each is packed by itself.
        pack, packs = np.full(len(samples), -1), 0
        for group in groups.tolist():
            members = np.flatnonzero(drawn.groups == group)
            packing = balanced(members, 1)
            pack[members] = np.where(packing.pack >= 0, packing.pack + packs, -1)
            packs += packing.num_steps
        return self._deal(pack, packs, first, last, window)

    def _deal(
        self, pack: np.ndarray, packs: int, first: int, last: bool, window: int
    ) -> tuple[np.ndarray, int]:
        """Deal packs to steps at random; those that make no whole step are carried over."""
        # Packs with samples that were carried over come first: they are never left over again.
        waiting = np.ones(packs)
        waiting[pack[:first][pack[:first] >= 0]] = 0
        deal = waiting + uniform_hash(self._seed, "packs", window, np.arange(packs))
        place = np.empty(packs, np.int64)
        place[np.argsort(deal, kind="stable")] = np.arange(packs)
        num_steps = -(-packs // self.packs_per_step) if last else packs // self.packs_per_step
        placed = pack >= 0
        pack[placed] = place[pack[placed]]
        pack[pack >= num_steps * self.packs_per_step] = -1
        return pack, num_steps

    def _shortest(self, samples: WindowSamples) -> np.ndarray:
        return samples.lengths_at(self._counts.trained_sides[0])

    def _fits(self, samples: WindowSamples) -> np.ndarray:
        fits = self._shortest(samples) <= self._pack.max_tokens
        if self._pack.max_tiles is not None:
            fits &= samples.tiles <= self._pack.max_tiles
        return fits

    def _checked(self, state: PlanState) -> PlanState:
        """The state, with its datasets named; InputError if it is not one of this plan."""
        sizes = [len(d.index) for d in self.mixture.datasets]
        if state == PlanState():
            return replace(state, datasets=self.mixture.names, taken=(0,) * len(sizes))
        if state.datasets != self.mixture.names or any(
            sample >= sizes[dataset] for dataset, _, sample in state.carry
        ):
            raise _foreign(state)
        return state

    def _nothing_fits(self, left_out: tuple[LeftOut, ...]) -> InputError:
        shortest = min(left_out, key=lambda sample: sample.tokens)
        limit = f"{self._pack.max_tokens} tokens"
        if self._pack.max_tiles is not None:
            limit += f" and {self._pack.max_tiles} tiles"
        return InputError(
            f"none of the {len(self.mixture)} samples fits into a pack of {limit}, the shortest "
            f"({self.mixture.name(shortest.sample)}) has {shortest.tokens} tokens and "
            f"{shortest.tiles} tiles; raise data.pack.max_tokens or data.pack.max_tiles"
        )


def _foreign(state: PlanState) -> InputError:
    return InputError(
        f"the saved place in the data (window {state.window}, step {state.step}, datasets "
        f"{', '.join(state.datasets) or 'none'}, {len(state.carry)} samples carried over) is not "
        "one of this plan: the data or their settings are not those of the run that saved it"
    )
