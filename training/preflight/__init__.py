"""Check the ranks of a job before training. `python -m training.preflight --help`."""
