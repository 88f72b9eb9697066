"""The op's steps in Triton, each the twin of the function of that name in `kernels.torch_impl`."""

from kernels.triton_impl.norm import norm, norm_backward
from kernels.triton_impl.pool_backward import pool_backward
from kernels.triton_impl.pool_norm import pool_norm
from kernels.triton_impl.swiglu import swiglu, swiglu_backward

__all__ = [
    "norm",
    "norm_backward",
    "pool_backward",
    "pool_norm",
    "swiglu",
    "swiglu_backward",
]
