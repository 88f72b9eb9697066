"""Modules that ZeRO-3 gathers in one piece, with no hook inside of them."""

from collections.abc import Iterable

from torch import nn


def gather_whole(modules: Iterable[nn.Module]) -> None:
    """Let each of these be gathered as one; before the engine takes the model over."""
    from deepspeed.utils import set_z3_leaf_module

    for module in modules:
        set_z3_leaf_module(module, True)
