"""A rank's share of the planned steps, built ahead of time in a few threads."""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import torch
from pydantic import Field

from data_pipeline.batch import IGNORE, PackBuilder, PackedBatch
from data_pipeline.config_file import Settings
from data_pipeline.errors import InputError
from data_pipeline.index import BadSample
from data_pipeline.plan import PackPlan, Planner, PlanState, StepPlan, steps_of
from data_pipeline.tiling import Resample

__all__ = [
    "IGNORE",
    "LoaderSettings",
    "PackBuilder",
    "PackedBatch",
    "StepBatch",
    "StepLoader",
]

_Item = TypeVar("_Item")

# Early on, a few bad samples say little about their rate: it is taken over this many at least.
_RATE_SAMPLES = 1000
_NAMED_BAD_SAMPLES = 5
_STOP_POLL_S = 0.2


class LoaderSettings(Settings):
    """How data is read while training runs."""

    threads: int = Field(2, gt=0)
    """Threads of each rank that plan, read, decode and tokenise."""
    prefetch_steps: int = Field(2, gt=0)
    """Steps that are being built or wait ready while one is trained; all are held in memory."""
    reduced_jpeg: bool = True
    """Decode large photographs at 1/2, 1/4 or 1/8 of their size where the tiles need no more."""
    resample: Resample = "torch"
    """What resizes pictures for training; evaluation takes pillow, as serving does."""
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """The run stops when more than this part of a rank's samples cannot be used."""


@dataclass
class StepBatch:
    """This rank's packs of one optimizer step.

    packs: in the order of the plan.
    state: the place in the plan after this step.
    plan: the step's plan, of all ranks.
    wait_s: seconds that the consumer waited for the step.
    store_retries: requests to stores tried again since the step before.
    following: the next step's first pack, if it is built by now.
    """

    packs: list[PackedBatch]
    state: PlanState
    plan: StepPlan
    wait_s: float = 0.0
    store_retries: int = 0
    following: Callable[[], PackedBatch | None] = lambda: None


class StepLoader:
    """Iterates over the steps of a plan, building this rank's packs: `packs[rank::world_size]`.

    Raises:
        InputError: the world size does not divide packs_per_step.
    """

    def __init__(
        self,
        planner: Planner,
        builder: PackBuilder,
        settings: LoaderSettings,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if planner.packs_per_step % world_size:
            raise InputError(
                f"data.pack.packs_per_step is {planner.packs_per_step}, which {world_size} ranks "
                "do not divide; start another number of ranks or change packs_per_step"
            )
        self._planner, self._builder, self._settings = planner, builder, settings
        self._rank, self._world_size = rank, world_size
        self._retries = 0  # those of the opening are the first step's

    def steps(
        self, state: PlanState | None = None, stop: Callable[[], bool] | None = None
    ) -> Generator[StepBatch, None, None]:
        """Steps from `state` on; closing the iterator ends its threads.

        Whatever goes wrong in a thread is raised here. Ends where the plan does, and when `stop` is
        true while a step is waited for.

        Raises:
            InputError: too many samples could not be used, or the state is not one of this plan;
                StoreError: a store fails.
        """
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        bad_rate = _BadRate(self._settings.max_bad_fraction)
        workers = ThreadPoolExecutor(self._settings.threads, thread_name_prefix="data-loader")
        # A thread of its own, so that the next window does not queue behind this one's images.
        planning = ThreadPoolExecutor(1, thread_name_prefix="data-planner")
        try:
            windows = _one_ahead(planning, self._planner.windows(state), stop)
            begun = (
                self._begin(step, after, workers, device)
                for step, after in steps_of(windows, state)
            )
            pending = deque(islice(begun, self._settings.prefetch_steps))
            while pending:
                start = time.perf_counter()
                step = pending.popleft()
                if not all(_wait(pack, stop) for pack in step.packs):
                    return
                batch = step.result()
                pending.extend(islice(begun, 1))
                batch.wait_s = time.perf_counter() - start
                batch.store_retries = self._builder.mixture.store_retries - self._retries
                self._retries += batch.store_retries
                bad_rate.count(batch.packs)
                batch.following = lambda: pending[0].first() if pending else None
                yield batch
        finally:
            for pool in (planning, workers):
                pool.shutdown(wait=False, cancel_futures=True)
            # A read that hangs may be why the run was asked to stop.
            for pool in () if stop is not None and stop() else (planning, workers):
                pool.shutdown(wait=True)

    def _begin(
        self, step: StepPlan, after: PlanState, workers: ThreadPoolExecutor, device: int | None
    ) -> "_PendingStep":
        share = step.packs[self._rank :: self._world_size]
        packs = [workers.submit(self._build, pack, device) for pack in share]
        return _PendingStep(packs, after, step)

    def _build(self, pack: PackPlan, device: int | None) -> PackedBatch:
        batch = self._builder.build(pack)
        if device is None:
            return batch
        torch.cuda.set_device(device)  # per thread; pinning would else open a context on GPU 0
        return batch.pin_memory()


@dataclass
class _PendingStep:
    """A step whose packs are being built."""

    packs: list[Future[PackedBatch]]
    state: PlanState
    plan: StepPlan

    def first(self) -> PackedBatch | None:
        """The first pack, if it is built and nothing went wrong."""
        future = self.packs[0]
        built = future.done() and not future.cancelled() and future.exception() is None
        return future.result() if built else None

    def result(self) -> StepBatch:
        return StepBatch([pack.result() for pack in self.packs], self.state, self.plan)


class _BadRate:
    """Counts the samples of this rank, and stops the run when too many could not be used."""

    def __init__(self, max_fraction: float) -> None:
        self.max_fraction = max_fraction
        self.samples = 0
        self.bad = 0
        self.first: dict[BadSample, None] = {}  # an ordered set: epochs repeat samples

    def count(self, packs: list[PackedBatch]) -> None:
        for pack in packs:
            self.samples += pack.num_samples
            self.bad += len(pack.bad)
            for bad in pack.bad:
                if len(self.first) < _NAMED_BAD_SAMPLES:
                    self.first[bad] = None
        if self.bad <= self.max_fraction * max(self.samples, _RATE_SAMPLES):
            return
        names = "\n".join(f"  {bad.shard}:{bad.key}: {bad.reason}" for bad in self.first)
        raise InputError(
            f"{self.bad} of {self.samples} samples could not be used, more than "
            f"data.loader.max_bad_fraction ({self.max_fraction}) allows; repair them or raise it. "
            f"The first:\n{names}"
        )


def _one_ahead(
    pool: ThreadPoolExecutor, items: Iterator[_Item], stop: Callable[[], bool] | None
) -> Iterator[_Item]:
    """The items, each computed in the pool while the one before is used."""
    following = pool.submit(next, items, None)
    while _wait(following, stop) and (item := following.result()) is not None:
        following = pool.submit(next, items, None)
        yield item


def _wait(future: Future[_Item], stop: Callable[[], bool] | None) -> bool:
    """Wait until the future is done; False if `stop` was true before."""
    if stop is None:
        return True  # its result() waits
    while not wait([future], timeout=_STOP_POLL_S).done:
        if stop():
            return False
    return True
