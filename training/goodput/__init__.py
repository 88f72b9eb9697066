"""Where a run's wall time went, over all its restarts. `python -m training.goodput --help`."""

from training.goodput.record import PHASES, Goodput
from training.goodput.report import Interval, Summary, summarize, table

__all__ = ["PHASES", "Goodput", "Interval", "Summary", "summarize", "table"]
