"""What runs a call: the Triton kernels or PyTorch, cuBLAS or the fused matrix products."""

import importlib.util
import os
import warnings
from functools import cache

import torch
from torch import Tensor

from kernels.launch import fused_by_default
from kernels.trial_launch import launch_obstacle

IMPLEMENTATIONS = ("auto", "triton", "torch")
GEMM_CHOICES = ("auto", "cublas", "fused")
_TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OLDEST = (8, 0)  # sm_80: bfloat16, cp.async
_HALF = (torch.bfloat16, torch.float16)


def implementation(impl: str, device: torch.device, dtype: torch.dtype) -> str:
    """What runs for `impl`: "triton" or "torch"; ValueError where the one asked for cannot run."""
    if impl == "torch":
        return impl
    if impl == "auto":
        if device.type != "cuda" or dtype not in _TRITON_DTYPES:
            return "torch"
        obstacle = _obstacle(device)
        return "torch" if obstacle else "triton"
    if not triton_found():
        raise ValueError("impl is 'triton', but triton is not installed; use impl='auto'")
    if dtype not in _TRITON_DTYPES:
        raise ValueError(
            f"impl is 'triton', x is {dtype}; the kernels take bfloat16, float16 and float32: "
            "cast x and the weights, or use impl='torch'"
        )
    if device.type != "cuda" and not interpreting():
        raise ValueError(
            f"impl is 'triton', x is on {device}; move x and the weights to a GPU, use "
            "impl='torch', or set TRITON_INTERPRET=1 before Python starts"
        )
    return impl


def triton_obstacle(device: torch.device) -> str | None:
    """Why the kernels cannot run on this GPU, with the remedy if there is one; None if they can."""
    if not triton_found():
        return "triton is not installed; install the version that torch asks for"
    if torch.version.hip is not None:
        return "the kernels were written and compiled for NVIDIA GPUs only"
    if torch.cuda.get_device_capability(device) < OLDEST:
        return f"the GPU is older than compute capability {OLDEST[0]}.{OLDEST[1]}"
    return launch_obstacle(device)


@cache
def _obstacle(device: torch.device) -> str | None:
    """`triton_obstacle`, which warns once where there is one."""
    obstacle = triton_obstacle(device)
    if obstacle:
        warnings.warn(
            f"the projector runs in plain PyTorch on {device}, tile sides one after the other: "
            f"{obstacle}",
            stacklevel=2,
        )
    return obstacle


def use_fused(kernel: str, gemm: str, impl: str, rows: int, like: Tensor, **sizes: int) -> bool:
    """Whether this fused GEMM, "dual_gemm" or "gate_gemm", runs, where `impl` does the rest.

    rows, like, sizes: what `kernels.launch.launch_config` is asked with.
    Raises ValueError where it is asked for and cannot run.
    """
    possible = impl == "triton" and like.dtype in _HALF
    if gemm == "fused" and not possible:
        raise ValueError(
            f"gemm is 'fused' with impl {impl!r} and {like.dtype}; the fused kernels are Triton's "
            "and take bfloat16 and float16: use gemm='auto'"
        )
    if gemm == "auto" and possible:
        return fused_by_default(kernel, rows, like, **sizes)
    return gemm == "fused"


@cache
def triton_found() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton runs its kernels on the CPU, in Python."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
