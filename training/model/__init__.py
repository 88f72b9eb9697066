"""The TokenFLEX model: `hub` is what users load; the rest trains it on packed samples."""

from training.model.hub import (
    TokenFlexConfig,
    TokenFlexForConditionalGeneration,
    TokenFlexImageProcessor,
    TokenFlexModel,
    TokenFlexProcessor,
    chatml_template,
)
from training.model.packed import PackedTokenFlex, TokenFlexOutput
from training.model.packed_projector import RELEASED_NAMES, TokenAdaptiveProjector

__all__ = [
    "RELEASED_NAMES",
    "PackedTokenFlex",
    "TokenAdaptiveProjector",
    "TokenFlexConfig",
    "TokenFlexForConditionalGeneration",
    "TokenFlexImageProcessor",
    "TokenFlexModel",
    "TokenFlexOutput",
    "TokenFlexProcessor",
    "chatml_template",
]
