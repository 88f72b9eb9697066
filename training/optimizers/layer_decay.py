"""Learning rates that fall from a tower's last layer to its first, as in BEiT and OpenCLIP."""

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from data_pipeline.errors import InputError


def layer_depths(tower: nn.Module) -> tuple[dict[int, int], int]:
    """({id of a parameter: its depth}, the largest depth) of a tower of L layers.

    0 is what comes before the layers (patches, positions), 1 to L the layers, L + 1 what follows
    them. A rate is `decay ** (largest - depth)` times the peak.

    Raises:
        InputError: it has no layers that transformers marks as such.
    """
    layers = [m for m in tower.modules() if isinstance(m, GradientCheckpointingLayer)]
    inner = {id(m) for layer in layers for m in layer.modules() if m is not layer}
    layers = [layer for layer in layers if id(layer) not in inner]
    if not layers:
        raise InputError(
            f"train.modules.vision_model.layer_decay: {type(tower).__name__} has no layers that "
            "transformers marks as such; set it to 1, which gives all of it one rate"
        )
    depths = {
        id(parameter): number
        for number, layer in enumerate(layers, start=1)
        for parameter in layer.parameters()
    }
    outside, last = 0, len(layers) + 1
    for parameter in tower.parameters():  # in the order in which they compute
        if id(parameter) in depths:
            outside = last
        else:
            depths[id(parameter)] = outside
    return depths, last
