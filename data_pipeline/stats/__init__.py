"""How good a plan is, from the index alone. `python -m data_pipeline.stats --help`."""
