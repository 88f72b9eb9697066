"""The TokenFLEX model: config, modelling, projector, packed attention and loss."""

from training.model.configuration_tokenflex import TokenFlexConfig
from training.model.modeling_tokenflex import TokenFlexForConditionalGeneration, TokenFlexOutput
from training.model.projector import RELEASED_NAMES, TokenAdaptiveProjector

__all__ = [
    "RELEASED_NAMES",
    "TokenAdaptiveProjector",
    "TokenFlexConfig",
    "TokenFlexForConditionalGeneration",
    "TokenFlexOutput",
]
