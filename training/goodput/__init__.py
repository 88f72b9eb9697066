"""Where a run's wall time went, over all its restarts. `python -m training.goodput --help`."""

from training.goodput.accounting import Interval, Summary, summarize, table
from training.goodput.recorder import PHASES, Goodput

__all__ = ["PHASES", "Goodput", "Interval", "Summary", "summarize", "table"]
