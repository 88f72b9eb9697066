"""Rates by layer: against the decay written out by name, for both families of towers."""

import re
from typing import Any

import pytest
import torch
from torch import nn

from data_pipeline.errors import InputError
from tests.training import test_flops
from training.config import TrainSettings
from training.model import PackedTokenFlex, TokenFlexConfig
from training.optimizers import layer_depths
from training.parameters import freeze, module_table, parameter_groups

LAYERS, PEAK, DECAY = 3, 4e-5, 0.7
FAMILIES = ("siglip_vision_model", "clip_vision_model")


def settings(decay: float = DECAY, **more: Any) -> TrainSettings:
    tower = {"lr": PEAK, "layer_decay": decay}
    return TrainSettings(steps=1, weight_decay=0.1, modules={"vision_model": tower}, **more)


def make(family: str, train: TrainSettings) -> Any:
    vision = test_flops.VISION | {"model_type": family, "num_hidden_layers": LAYERS}
    config = TokenFlexConfig(
        vision_config=vision, text_config=test_flops.TEXT, image_token_id=test_flops.IMAGE
    )
    with torch.device("meta"):
        model = PackedTokenFlex._from_config(config)
    freeze(model, train.modules)
    return model


def rate_by_name(name: str) -> float:
    """As BEiT numbers them: embeddings 0, layer i (from 0) i + 1, all that follows L + 1."""
    if name.startswith("vision_model."):
        layer = re.search(r"\.layers\.(\d+)\.", name)
        before = "embeddings" in name or "pre_layrnorm" in name
        depth = 0 if before else LAYERS + 1
        return PEAK * DECAY ** (LAYERS + 1 - (int(layer[1]) + 1 if layer else depth))
    return 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_has_the_rate_of_its_depth_and_is_in_one_group(family: str) -> None:
    train = settings()
    model = make(family, train)
    groups = parameter_groups(model, train)
    found = {id(p): group for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found)
    for name, parameter in model.named_parameters():
        group = found.pop(id(parameter))
        assert group["lr"] == group["peak_lr"] == pytest.approx(rate_by_name(name)), name
        assert group["weight_decay"] == (0.1 if parameter.ndim >= 2 else 0.0), name
    assert not found
    assert len({group["name"] for group in groups}) == len(groups)
    lowest = f"{PEAK * DECAY ** (LAYERS + 1):.1e} to {PEAK:.1e}"
    assert lowest in module_table(model, train).splitlines()[1]


def test_without_a_decay_the_groups_are_those_of_before() -> None:
    train = settings(1.0)
    names = [group["name"] for group in parameter_groups(make(FAMILIES[0], train), train)]
    assert names[:3] == ["vision_model.decay", "vision_model.no_decay", "projector.decay"]


def test_where_it_has_no_effect_it_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"layer_decay=0\.7 .*does not train; .*train: true"):
        TrainSettings(
            steps=1, modules={"vision_model": {"train": False, "layer_decay": 0.7}}, adapters={}
        )
    with pytest.raises(InputError, match=r"layer_decay: Linear has no layers .*set it to 1"):
        layer_depths(nn.Linear(2, 2))
