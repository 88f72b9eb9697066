"""The op's steps in Triton, each the twin of the function of that name in `kernels.torch_impl`."""

from kernels.triton_impl.dual_gemm import dual_gemm_swiglu
from kernels.triton_impl.gate_gemm import gate_gemm_backward
from kernels.triton_impl.layer_norm import norm, norm_backward
from kernels.triton_impl.pool_backward import pool_backward
from kernels.triton_impl.pool_norm import pool_norm
from kernels.triton_impl.swiglu import swiglu, swiglu_backward

__all__ = [
    "dual_gemm_swiglu",
    "gate_gemm_backward",
    "norm",
    "norm_backward",
    "pool_backward",
    "pool_norm",
    "swiglu",
    "swiglu_backward",
]
