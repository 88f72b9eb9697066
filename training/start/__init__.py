"""How a run starts: anew, from an earlier stage's weights, or where it stopped; what may change."""

from training.start.begin import start

__all__ = ["start"]
