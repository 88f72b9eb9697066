"""Samples/s against padded batches and other trainers. `python -m training.bench --help`."""
