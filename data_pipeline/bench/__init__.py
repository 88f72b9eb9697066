"""What the pipeline can do, measured: `python -m data_pipeline.bench`.

Each module has `measure(quick) -> dict` with units in its keys, and prints nothing.
"""
