"""A matrix with its adapter in it, as exports and later stages get it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from training.adapters.adapted_model import lora_config
from training.adapters.adapter_names import ADAPTER
from training.adapters.adapter_settings import AdapterSettings


def merged(matrix: Tensor, pieces: Mapping[str, Tensor], settings: AdapterSettings) -> Tensor:
    """A matrix [out, in] and the parts of its adapter, by name, as one: fp32 [out, in]."""
    from peft import inject_adapter_in_model

    rows, columns = matrix.shape
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    linear.weight = nn.Parameter(matrix.to(torch.float32, copy=True), requires_grad=False)
    holder = nn.ModuleDict({"matrix": linear})
    # Beside the projector's matrices, too: what PEFT merges is the same product.
    inject_adapter_in_model(lora_config(settings, ["matrix"]), holder, ADAPTER)
    layer: Any = holder["matrix"]
    with torch.no_grad():
        for name, value in pieces.items():
            getattr(layer, name)[ADAPTER].weight.copy_(value)
        layer.merge()
    weight: Tensor = layer.get_base_layer().weight
    return weight.detach()
