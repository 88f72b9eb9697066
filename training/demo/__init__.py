"""A page to try an exported model. `python -m training.demo --help`."""
