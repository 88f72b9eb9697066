"""The op's forward and backward as a sequence of steps, the same for PyTorch and for Triton.

    forward    pool + LayerNorm -> two GEMMs -> SwiGLU -> GEMM                      (3 GEMMs)
    backward   GEMM -> SwiGLU' -> LayerNorm' -> pool', and a GEMM per weight        (6 GEMMs)

`do` is the module with the steps (`kernels.torch_impl`, `kernels.triton_impl`); matrix products are
torch's own (cuBLAS) unless `fused`. Nothing that was saved is written to.
"""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.tile_layout import TileLayout


class Weights(NamedTuple):
    """The parameters, as `torch.nn.Linear` and `LayerNorm` keep them."""

    norm_weight: Tensor
    norm_bias: Tensor
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    w3: Tensor
    b3: Tensor


class Saved(NamedTuple):
    """What backward needs of forward: pooled [M, C], its statistics [M], gate and value [M, F].

    gate and value have no rows where backward is to compute them again; pooled has none where no
    backward will come.
    """

    pooled: Tensor
    mean: Tensor
    rstd: Tensor
    gate: Tensor
    value: Tensor


class Needs(NamedTuple):
    """Which gradients are asked for: of x, the norm's two, w1 to b2, w3 and b3."""

    x: bool
    norm: bool
    gates: bool
    out: bool


class Gradients(NamedTuple):
    """Of x and the eight weights; None where not asked for."""

    x: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    w1: Tensor | None = None
    b1: Tensor | None = None
    w2: Tensor | None = None
    b2: Tensor | None = None
    w3: Tensor | None = None
    b3: Tensor | None = None


def forward(
    do: ModuleType, x: Tensor, layout: TileLayout, w: Weights, keep: str, fused: bool, eps: float
) -> tuple[Tensor, Saved]:
    """x [P, C] -> out [M, D] and what `keep` ("save", "recompute", "none") asks to save."""
    pooled, normed, mean, rstd = do.pool_norm(
        x, layout, w.norm_weight, w.norm_bias, eps, keep_pooled=keep != "none"
    )
    gate, value, product = gates(do, normed, w, fused, keep_gates=keep == "save")
    del normed
    out = torch.addmm(w.b3, product, w.w3.t())
    return out, Saved(pooled, mean, rstd, gate, value)


def backward(
    do: ModuleType,
    grad: Tensor,
    layout: TileLayout,
    w: Weights,
    saved: Saved,
    needs: Needs,
    fused: bool,
) -> Gradients:
    """The gradients that `needs` names, from that of out [M, D]."""
    pooled, mean, rstd, gate, value = saved
    normed = None
    recompute = len(gate) == 0
    if recompute:
        normed = do.norm(pooled, mean, rstd, w.norm_weight, w.norm_bias)
        gate, value = _two_gemms(normed, w)
    found: dict[str, Tensor] = {}
    grad_gate, grad_value, product, sum_gate, sum_value = through_swiglu(
        do, grad, w.w3, gate, value, fused, overwrite=recompute
    )
    if needs.out:
        found["w3"] = grad.t() @ product
        found["b3"] = grad.sum(0, dtype=sum_gate.dtype).to(grad.dtype)
    del gate, value, product
    if needs.x or needs.norm:
        grad_normed = torch.mm(grad_gate, w.w1).addmm_(grad_value, w.w2)
        keep_normed = needs.gates and normed is None
        grad_pooled, sum_weight, sum_bias, again = do.norm_backward(
            grad_normed, pooled, mean, rstd, w.norm_weight, w.norm_bias, needs.x, keep_normed
        )
        del grad_normed
        normed = again if keep_normed else normed
        if needs.norm:
            found["norm_weight"] = _own(sum_weight, w.norm_weight)
            found["norm_bias"] = _own(sum_bias, w.norm_bias)
        if needs.x:
            found["x"] = do.pool_backward(grad_pooled, layout)
    if needs.gates:
        if normed is None:
            normed = do.norm(pooled, mean, rstd, w.norm_weight, w.norm_bias)
        found["w1"], found["b1"] = grad_gate.t() @ normed, _own(sum_gate, grad)
        found["w2"], found["b2"] = grad_value.t() @ normed, _own(sum_value, grad)
    return Gradients(**found)


def _own(total: Tensor, like: Tensor) -> Tensor:
    """In the dtype of `like`, and a copy: a custom op may not return parts of one tensor."""
    return total.to(like.dtype, copy=True)


def gates(
    do: ModuleType, normed: Tensor, w: Weights, fused: bool, keep_gates: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """gate, value (no rows unless `keep_gates`) and their product, [M, F] each."""
    if fused:
        product, gate, value = do.dual_gemm_swiglu(
            normed, w.w1, w.b1, w.w2, w.b2, keep_gates=keep_gates
        )
    else:
        gate, value = _two_gemms(normed, w)
        product = do.swiglu(gate, value)
    if keep_gates:
        return gate, value, product
    return normed.new_empty(0, len(w.w1)), normed.new_empty(0, len(w.w1)), product


def _two_gemms(normed: Tensor, w: Weights) -> tuple[Tensor, Tensor]:
    """gate and value [M, F] of normed [M, C]."""
    return torch.addmm(w.b1, normed, w.w1.t()), torch.addmm(w.b2, normed, w.w2.t())


def through_swiglu(
    do: ModuleType,
    grad: Tensor,
    w3: Tensor,
    gate: Tensor,
    value: Tensor,
    fused: bool,
    overwrite: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of gate and value, the product again, and both gradients' column sums."""
    if fused:
        into = {"out_a": gate, "out_b": value} if overwrite else {}
        return do.gate_gemm_backward(grad, w3, gate, value, **into)
    return do.swiglu_backward(torch.mm(grad, w3), gate, value, overwrite=overwrite)
