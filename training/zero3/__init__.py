"""All that knows DeepSpeed: the one implementation of `training/engine_interface.py`."""

import os

import torch

PACKAGE = "deepspeed"

# DeepSpeed reads this when it is imported; without it a CUDA build of torch on a machine
# without a GPU is probed at length.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
