"""What flexible token counts buy: `python -m training.experiments.flexibility --help`."""
