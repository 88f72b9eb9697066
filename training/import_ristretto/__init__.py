"""The released Ristretto-3B, both ways. `python -m training.import_ristretto --help`."""
