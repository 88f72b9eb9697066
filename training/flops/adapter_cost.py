"""What adapters cost beside the products of their part."""

import copy
from dataclasses import dataclass
from typing import Any

import torch

from training.adapters import (
    AdapterSettings,
    ProjectorAdapterSettings,
    StageAdapters,
    adapted_layers,
    add_adapters,
)
from training.model import PackedTokenFlex, TokenFlexConfig


@dataclass(frozen=True)
class AdapterCost:
    """Of a part of the model, all its layers together.

    weights: in products, for each position. last: of these, in the products that end a layer,
    which activation checkpointing does not compute again. fixed: FLOPs once a pack. gates, out:
    whether there are adapters beside the projector's first two matrices, and its last.
    """

    weights: float = 0.0
    last: float = 0.0
    fixed: float = 0.0
    gates: bool = False
    out: bool = False


def adapter_costs(config: TokenFlexConfig, adapters: StageAdapters) -> dict[str, AdapterCost]:
    """By part; the layers are those of the model itself, built without values."""
    costs = dict.fromkeys(type(adapters).model_fields, AdapterCost())
    if not adapters.given:
        return costs
    with torch.device("meta"):
        model: Any = PackedTokenFlex._from_config(copy.deepcopy(config))
        add_adapters(model, adapters, seed=0)
    for part, settings in adapters.given.items():
        if isinstance(settings, ProjectorAdapterSettings):
            costs[part] = _beside_the_projector(model.projector, settings)
        else:
            costs[part] = _beside_layers(getattr(model, part), settings)
    return costs


def _beside_layers(part: Any, settings: AdapterSettings) -> AdapterCost:
    sizes = [(layer.in_features, layer.out_features) for _, layer in adapted_layers(part)]
    weights = sum(settings.r * (inputs + outputs) for inputs, outputs in sizes)
    last = sum(settings.r * outputs for inputs, outputs in sizes if inputs > outputs)
    fixed = 0
    if settings.use_dora:  # PEFT makes B A by a unit matrix, for the lengths of its rows
        fixed = sum(2 * settings.r * inputs * (inputs + outputs) for inputs, outputs in sizes)
    return AdapterCost(weights, last, fixed)


def _beside_the_projector(projector: Any, settings: ProjectorAdapterSettings) -> AdapterCost:
    matrices = {name: getattr(projector, name).numel() for name in settings.matrices}
    fixed = 6.0 * settings.r * sum(matrices.values())
    return AdapterCost(0, 0, fixed, "w1" in matrices or "w2" in matrices, "w3" in matrices)
