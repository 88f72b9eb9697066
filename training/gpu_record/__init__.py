"""Measure all that needs a GPU, once one is there. `python -m training.gpu_record --help`."""
