"""All that watches a run, behind the few calls that its loop makes."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from training.config import RunConfig
from training.distributed import Ranks
from training.goodput import Goodput
from training.health.loss_guard import LossGuard
from training.health.preemption import StopRequest
from training.health.slow_start import SlowStart
from training.health.timeouts import set_timeout
from training.health.watchdog import PATIENT, Watchdog
from training.profiling import StepProfiler, phase
from training.side_outputs import SideFiles

# The watchdog speaks first, since it can name the rank that hangs.
_GRACE_S = 30.0
_TRACED = {"data_wait": "data", "checkpoint_stall": "checkpoint", "evaluation": "evaluation"}


class Monitor:
    """Stop requests, watchdog, timeouts, loss guard, goodput and traces of a run, while entered.

    And the writer of its `files`.

    A phase is one of `goodput.PHASES`; those of `watchdog.PATIENT` may take `startup_timeout_s`.

    Args:
        stop: one that was entered earlier, so that a signal counts while ranks still gather.
    """

    def __init__(self, config: RunConfig, ranks: Ranks, stop: StopRequest | None = None) -> None:
        self.faults = config.faults
        self.stop = stop or StopRequest()
        self.guard = LossGuard(config.faults)
        self.files = SideFiles()
        self.goodput = Goodput(config.output_dir, ranks, files=self.files)
        self.profiler = StepProfiler(config.profile, config.output_dir, ranks)
        self.watchdog = Watchdog(config.output_dir / "health", ranks, config.faults)
        self.start = SlowStart()
        self.outcome = "finished"
        self._running = False
        self._step = 0
        self._entered = ExitStack()

    def __enter__(self) -> "Monitor":
        if not self.stop.entered:
            self._entered.enter_context(self.stop)
        self._entered.enter_context(self.watchdog)
        self._entered.enter_context(self.start)
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self.profiler.close()
        self.goodput.end(self.outcome if kind is None else kind.__name__)
        self.files.close()
        self._entered.close()

    def ready(self, step: int) -> None:
        """The engine is built (its process groups exist); the step after `step` comes first."""
        self.start.over()
        set_timeout(self.faults.startup_timeout_s + _GRACE_S)
        self._step = step
        self.goodput.ready(step)
        self.watchdog.beat("startup", step)

    def step_begins(self, step: int) -> None:
        """A step is about to begin, with its wait for data."""
        self.profiler.begins(step)

    def step_done(self, step: int) -> None:
        """A step is done; after the first, ranks must answer within `step_timeout_s`."""
        self._step = step
        self.profiler.done(step)
        self.goodput.step(step)
        self.watchdog.beat("steps", step)
        if not self._running:
            self._running = True
            set_timeout(self.faults.step_timeout_s + _GRACE_S)
            self.watchdog.first_step_done()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge what is done inside to a phase, with the patience that it needs."""
        patient = self._running and name in PATIENT
        self.watchdog.beat(name, self._step)
        if patient:
            set_timeout(self.faults.startup_timeout_s + _GRACE_S)
        try:
            with self.goodput.phase(name), phase(_TRACED[name]):
                yield
        finally:
            if patient:
                set_timeout(self.faults.step_timeout_s + _GRACE_S)
            self.watchdog.beat("steps", self._step)

    def between_batches(self) -> Callable[[], bool]:
        """For evaluation, which asks between batches whether to stop: being asked is progress."""

        def asked() -> bool:
            self.watchdog.beat("evaluation", self._step)
            return self.stop.requested

        return asked
