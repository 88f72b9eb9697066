"""Write down what a finished run measured. `python -m training.record --help`."""
