"""Profiling of the projector: `python -m kernels.profile --help`. Start reading at __main__.py."""
