"""Losses and gradients that are not finite never reach the weights; a loss that leaps is reported.

Every rank must give its guard the same values, those of all ranks: then all decide alike.
"""

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from training.config import FaultSettings
from training.engine_interface import Engine

WINDOW = 100  # finite losses that a new one is compared with
_FEWEST = 20  # fewer say too little about their spread
SKIPPED = "skipped_steps"  # the metric that tells a resumed run how many it has left out


@dataclass(frozen=True)
class Verdict:
    """What became of an optimizer step.

    norm: the gradient norm; NaN where the loss stopped the step before it was taken.
    fault: None if the step was made, else what was not finite, as "the loss is nan".
    stop: whether the run must end: no more steps may be left out.
    """

    norm: float
    fault: str | None = None
    stop: bool = False


class LossGuard:
    """Makes optimizer steps, but leaves out those whose loss or gradient is not finite."""

    def __init__(self, settings: FaultSettings) -> None:
        self.settings = settings
        self.skipped = 0
        self._recent: deque[float] = deque(maxlen=WINDOW)

    def restore(self, rows: Iterable[dict[str, Any]]) -> None:
        """Go on from the metrics of earlier steps, in order (the same on every rank)."""
        for row in rows:
            skipped = row.get(SKIPPED)
            self.skipped = skipped if isinstance(skipped, int) else self.skipped
            self._remember(row["loss"] if isinstance(row["loss"], float) else math.nan)

    def update(self, engine: Engine, loss: float) -> Verdict:
        """Make the step, or leave it out where nothing may change.

        Args:
            engine: every pack's backward is done.
            loss: of the step, over all ranks.
        """
        if not math.isfinite(loss):
            engine.skip()
            return self._fault(f"the loss is {loss}", math.nan)
        norm = engine.step()
        if not math.isfinite(norm):  # the engine has left the step out by itself
            return self._fault(f"the gradient norm is {norm}", norm)
        return Verdict(norm)

    def _fault(self, fault: str, norm: float) -> Verdict:
        self.skipped += 1
        return Verdict(norm, fault, stop=self.skipped > self.settings.max_skipped_steps)

    def spike(self, loss: float) -> str | None:
        """A message if a step's loss is far above the recent ones; remembers it in any case."""
        message = self._describe_spike(loss)
        self._remember(loss)
        return message

    def _describe_spike(self, loss: float) -> str | None:
        if not self.settings.spike_sigma or len(self._recent) < _FEWEST or not math.isfinite(loss):
            return None
        mean = math.fsum(self._recent) / len(self._recent)
        variance = math.fsum((value - mean) ** 2 for value in self._recent) / len(self._recent)
        # Of a loss that hardly moves, the spread is rounding: a thousandth of it is none.
        spread = max(math.sqrt(variance), 1e-3 * abs(mean), 1e-12)
        sigmas = (loss - mean) / spread
        if sigmas <= self.settings.spike_sigma:
            return None
        return (
            f"the loss is {loss:.4g}, {sigmas:.1f} standard deviations above the mean of the last "
            f"{len(self._recent)} steps ({mean:.4g}; faults.spike_sigma is "
            f"{self.settings.spike_sigma:g})"
        )

    def _remember(self, loss: float) -> None:
        if math.isfinite(loss):
            self._recent.append(loss)
