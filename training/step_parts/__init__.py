"""Where a step's time goes, part by part. `python -m training.step_parts --help`."""
