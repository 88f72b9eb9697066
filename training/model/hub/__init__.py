"""What an exported folder needs to load with `trust_remote_code=True`: these files, copied flat.

They import torch, transformers, numpy, Pillow and each other, nothing else of this repository; so
do the processor's, which are in `data_pipeline.processor`.
Importing this package makes transformers' Auto classes know the model without any folder's code,
and `save_pretrained` write the code beside the weights.
"""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
)

from data_pipeline.processor.image_processing_tokenflex import TokenFlexImageProcessor
from data_pipeline.processor.processing_tokenflex import TokenFlexProcessor, chatml_template

from .configuration_tokenflex import TokenFlexConfig
from .generation_tokenflex import TokenFlexGenerationMixin
from .modeling_tokenflex import TokenFlexForConditionalGeneration, TokenFlexModel
from .projector_tokenflex import TokenFlexProjector
from .token_method_tokenflex import TokenMethod
from .token_methods_tokenflex import METHODS

__all__ = [
    "METHODS",
    "TokenFlexConfig",
    "TokenFlexForConditionalGeneration",
    "TokenFlexGenerationMixin",
    "TokenFlexImageProcessor",
    "TokenFlexModel",
    "TokenFlexProcessor",
    "TokenFlexProjector",
    "TokenMethod",
    "chatml_template",
]

AutoConfig.register(TokenFlexConfig.model_type, TokenFlexConfig)
AutoModel.register(TokenFlexConfig, TokenFlexModel)
AutoModelForImageTextToText.register(TokenFlexConfig, TokenFlexForConditionalGeneration)
AutoImageProcessor.register(
    TokenFlexConfig, image_processor_classes={"pil": TokenFlexImageProcessor}
)
AutoProcessor.register(TokenFlexConfig, TokenFlexProcessor)

TokenFlexConfig.register_for_auto_class()
TokenFlexModel.register_for_auto_class("AutoModel")
TokenFlexForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
TokenFlexImageProcessor.register_for_auto_class()
TokenFlexProcessor.register_for_auto_class()
