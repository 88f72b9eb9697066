"""Liger's kernels in the language model: norms, rotary positions and SwiGLU.

They work token by token, so packs stay packs, and take their weights from the modules that they
are patched into, so ZeRO-3 gathers them as before. The loss stays ours: see docs/performance.md.
"""

import importlib.util
import inspect
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

KNOWN = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
"""Model types whose results and gradients are tested against transformers' own."""
_OFF = ("cross_entropy", "fused_linear_cross_entropy")


def liger_refusal(llm: Mapping[str, Any]) -> str | None:
    """Why Liger's kernels would compute something else for this configuration, and what to do."""
    kind, back = llm.get("model_type"), "take train.decoder_impl=transformers"
    if kind not in KNOWN:
        known = ", ".join(KNOWN)
        return f"model.llm.config.model_type is {kind}; expected one of {known}, or {back}"
    act = llm.get("hidden_act", "silu")
    if act not in ("silu", "swish"):
        return f"model.llm.config.hidden_act is {act}, but its MLP computes silu; {back}"
    return None


def liger_obstacle(device: torch.device) -> str | None:
    """What keeps Liger's kernels from running on this machine, with the remedy; None: nothing."""
    if importlib.util.find_spec("liger_kernel") is None:
        return (
            "liger-kernel is not installed; install the version in tests/environments/liger.txt "
            "(pip install --no-deps -r tests/environments/liger.txt)"
        )
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "its Triton kernels need a GPU; take train.decoder_impl=transformers"
    return None


def apply_liger(language_model: nn.Module) -> None:
    """Patch a causal language model of transformers, and the module of its class, in place."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    config: Any = language_model.config
    apply = MODEL_TYPE_TO_APPLY_LIGER_FN[config.model_type]
    off = dict.fromkeys(set(_OFF) & inspect.signature(apply).parameters.keys(), False)
    apply(model=language_model, **off)
