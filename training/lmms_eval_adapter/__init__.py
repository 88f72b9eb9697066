"""lmms-eval's benchmarks on an exported model. `python -m training.lmms_eval_adapter --help`."""

from training.lmms_eval_adapter.adapter import TokenFlexLmmsEval, manifest

__all__ = ["TokenFlexLmmsEval", "manifest"]
