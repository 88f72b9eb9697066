"""FlashAttention 3 through PyTorch's own switch, for packs and for the vision tower."""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.attention

from data_pipeline.errors import InputError

_PACKAGE = "flash_attn_interface"
_BACK = "take train.flash_attention=torch"


def fa3_refusal(precision: str) -> str | None:
    """Why no machine could, and what to do."""
    if precision == "fp32":
        return f"FlashAttention 3 has no fp32; train in bf16, or {_BACK}"
    return None


def fa3_obstacle(device: torch.device) -> str | None:
    """What keeps FlashAttention 3 from running on this machine, with the remedy; None: nothing."""
    if _switch() is None:
        return f"torch {torch.__version__} lacks the switch; take 2.11 or later, or {_BACK}"
    if device.type != "cuda" or torch.version.hip is not None:
        return f"it needs an NVIDIA GPU of compute capability 9.0 (Hopper); {_BACK}"
    capability = torch.cuda.get_device_capability(device)
    if capability[0] != 9:
        found = ".".join(map(str, capability))
        return f"it needs compute capability 9.0 (Hopper), this GPU has {found}; {_BACK}"
    if importlib.util.find_spec(_PACKAGE) is None:
        return (
            f"{_PACKAGE} is not installed; build it from the folder hopper of "
            f"github.com/Dao-AILab/flash-attention, or {_BACK}"
        )
    return None


def activate_fa3() -> None:
    """Let PyTorch's FlashAttention ops run FlashAttention 3, in this whole process.

    Raises:
        InputError: the package is not the one that PyTorch expects.
    """
    switch = _switch()
    assert switch is not None  # fa3_obstacle said so
    try:
        switch("FA3")
    except (ImportError, RuntimeError, ValueError) as error:
        raise InputError(
            f"train.flash_attention=fa3: {_PACKAGE} cannot be used: {error}; install a build for "
            f"torch {torch.__version__}, or {_BACK}"
        ) from error


def _switch() -> Callable[[str], Any] | None:
    return getattr(torch.nn.attention, "activate_flash_attention_impl", None)
