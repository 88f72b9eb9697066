"""`torch.compile` of the layers of the vision tower and of the language model, one by one.

Layers of a class share what was compiled, for every length of a pack and every number of tiles.
Attention stays outside: how a pack is cut into samples would compile it anew for every pack. The
engine's hooks stay outside, too: it gathers a layer as a whole (`zero3/whole_layers.py`), so that
nothing inside of it waits for a weight. Activation checkpointing runs what was compiled once more.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from data_pipeline.errors import InputError
from kernels import triton_obstacle
from training.model.attention import ATTENTION_NAME, packed_attention

BACKEND = "inductor"
_COMPILERS = ("g++", "clang++", "c++")
_BACK = "take train.compile_layers=false"


def compile_obstacle(device: torch.device) -> str | None:
    """What keeps this machine from compiling, with the remedy; None: nothing."""
    if device.type == "cuda":
        text = None if torch.version.hip is not None else triton_obstacle(device)
    else:
        found = any(map(shutil.which, _COMPILERS))
        text = None if found else f"no C++ compiler is installed ({', '.join(_COMPILERS)})"
    return f"{text}; mend that, or {_BACK}" if text else None


def layers_of(model: nn.Module, modules: Sequence[str]) -> Iterator[nn.Module]:
    """The repeated layers of these modules, outermost ones alone.

    Raises:
        InputError: a module has none that is known as a layer.
    """
    for name in modules:
        part = model.get_submodule(name)
        found = [m for m in part.modules() if isinstance(m, GradientCheckpointingLayer)]
        if not found:
            raise InputError(
                f"train.compile_layers: {name} ({type(part).__name__}) has no layers that "
                f"transformers marks as such; leave it out, or {_BACK}"
            )
        inner = {id(m) for layer in found for m in layer.modules() if m is not layer}
        yield from (layer for layer in found if id(layer) not in inner)


def compile_layers(model: nn.Module, modules: Sequence[str]) -> None:
    """Compile the layers of these modules, each when it first runs."""
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, torch.compiler.disable(packed_attention))
    compiled: dict[type, Callable[..., Any]] = {}
    for layer in layers_of(model, modules):
        kind: Any = type(layer)
        if kind not in compiled:
            # Below activation checkpointing, which transformers wraps around forward.
            compiled[kind] = torch.compile(kind.forward.__wrapped__, backend=BACKEND, dynamic=True)
        layer.forward = partial(_forward, layer, compiled[kind])


def _forward(layer: Any, compiled: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if layer.gradient_checkpointing and layer.training:
        return layer._gradient_checkpointing_func(partial(compiled, layer, **kwargs), *args)
    return compiled(layer, *args, **kwargs)
