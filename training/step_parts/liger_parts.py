"""Liger-Kernel's versions of the parts, on the same weights, where it is installed."""

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from kernels.profile.baselines import Call
from training.model.loss import Supervision


def liger_missing(device: torch.device) -> str | None:
    """Why Liger's versions cannot run, with what to do; None where they can."""
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed; to compare with it: pip install liger-kernel"
    return None if device.type == "cuda" else "needs a GPU"


def liger_norm(module: Any, device: torch.device) -> Call:
    """RMSNorm in one kernel."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    eps = getattr(module, "variance_epsilon", getattr(module, "eps", 1e-6))
    return lambda x, w: LigerRMSNormFunction.apply(x, module.weight, eps, 0.0, "llama", False)


def liger_mlp(module: Any, device: torch.device) -> Call:
    """SwiGLU in one kernel between the same matrix products."""
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    def call(x: Tensor, w: Any) -> Tensor:
        gates = LigerSiLUMulFunction.apply(module.gate_proj(x), module.up_proj(x))
        out: Tensor = module.down_proj(gates)
        return out

    return call


def liger_loss(module: nn.Module, given: Supervision) -> Call:
    """Logits and cross-entropy fused; it makes the gradients in its forward."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    head: Any = module
    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")

    def call(x: Tensor, w: Any) -> Tensor:
        rows = x.flatten(0, 1).index_select(0, given.positions)
        found: Tensor = loss(head.weight, rows, given.targets, head.bias)
        return found

    return call
