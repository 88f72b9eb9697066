"""What reads of remote shards took: requests, retries, bytes."""

import logging
import threading
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)


@dataclass
class ReadCounts:
    """Counts of one process; thread-safe.

    requests: attempts of reads, sizes and listings, those that failed included.
    retries: requests that were tried again.
    bytes: of the answers that were complete.
    bytes_unused: of these, between members that came in one request.
    """

    requests: int = 0
    retries: int = 0
    bytes: int = 0
    bytes_unused: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, **counts: int) -> None:
        """Add to some of the counts."""
        with self._lock:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)

    def retry(self, problem: str) -> None:
        """Count a request that is tried again; the 1st, 2nd, 4th, 8th ... are logged."""
        self.add(retries=1)
        if not self.retries & (self.retries - 1):
            logger.warning("storage: %d requests tried again so far; %s", self.retries, problem)
