"""Experiments: many runs of the trainer compared, and what follows from them."""
