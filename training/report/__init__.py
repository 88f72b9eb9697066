"""One HTML page of a run, or of several side by side. `python -m training.report --help`."""
