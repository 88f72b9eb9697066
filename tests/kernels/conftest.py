"""Without a GPU kernels are tested in Triton's interpreter, chosen before triton is imported."""

import os
import sys

import torch

if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")
