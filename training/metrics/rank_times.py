"""Which rank the others wait for: seconds of every rank, averaged over the last steps."""

from collections import deque

import numpy as np


class RankTimes:
    """Seconds from a step's start until a rank's last loss is there, over a window of steps.

    Ranks wait for each other in every layer that is gathered, so that the slowest leads by little;
    who it is shows over several steps.
    """

    def __init__(self, rank: int, world_size: int, window: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.steps: deque[list[float]] = deque(maxlen=window)

    def row(self, seconds: float) -> list[float]:
        """This rank's part of a vector over ranks, for a maximum; none for a rank alone."""
        if self.world_size == 1:
            return []
        return [seconds if rank == self.rank else 0.0 for rank in range(self.world_size)]

    def extremes(self, seconds: list[float]) -> dict[str, float]:
        """The slowest and the fastest rank of the window that ends with these seconds by rank."""
        if not seconds:
            return {}
        self.steps.append(seconds)
        mean = np.mean(self.steps, axis=0)
        slowest, fastest = int(mean.argmax()), int(mean.argmin())
        return {
            "slowest_rank": slowest,
            "slowest_rank_s": float(mean[slowest]),
            "fastest_rank": fastest,
            "fastest_rank_s": float(mean[fastest]),
        }
