"""From settings to a model: architectures from the config, weights from a folder or a hub."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, SiglipVisionModel

from data_pipeline.errors import InputError
from data_pipeline.tokenizer import Tokenizer
from training.config import BackboneSettings, ModelSettings, RunConfig
from training.model import PackedTokenFlex, TokenFlexConfig

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def model_config(settings: ModelSettings, vocab_size: int, image_token_id: int) -> TokenFlexConfig:
    """The transformers configuration of a run's model.

    Args:
        settings: the `model` section.
        vocab_size: of the tokenizer, special tokens included; the language model's grows to it.
        image_token_id: id of `<IMG_CONTEXT>`.
    """
    llm = dict(settings.llm.config)
    llm["vocab_size"] = max(vocab_size, llm.get("vocab_size", 0))
    try:
        return TokenFlexConfig(
            vision_config={**settings.vision.config, "vision_use_head": False},
            text_config=llm,
            pool=settings.pool,
            projector_hidden_ratio=settings.projector_hidden_ratio,
            image_token_id=image_token_id,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"the model section does not describe a model: {error}") from error


def build_model(
    config: RunConfig, tokenizer: Tokenizer, pretrained: bool = True
) -> PackedTokenFlex:
    """Build the model, from random weights or pretrained ones per part.

    Under a live `HfDeepSpeedConfig` its parameters are partitioned as they are made, and
    pretrained weights are read by rank 0 only.

    Raises:
        InputError: if pretrained weights do not fit the architecture; it names the part.
    """
    settings, dtype = config.model, DTYPES[config.train.precision]
    image_token_id = tokenizer.special_id("<IMG_CONTEXT>")
    full = model_config(settings, tokenizer.vocab_size, image_token_id)
    model = PackedTokenFlex._from_config(full, dtype=dtype)
    model.projector.backward_mode = config.train.projector_backward
    model.projector.impl = config.train.projector_impl
    if settings.vision.pretrained and pretrained:
        model.vision_model = _pretrained("vision", settings.vision, model, SiglipVisionModel)
    if settings.llm.pretrained and pretrained:
        llm = _pretrained("llm", settings.llm, model, AutoModelForCausalLM)
        if llm.config.vocab_size != full.text_config.vocab_size:
            llm.resize_token_embeddings(full.text_config.vocab_size, mean_resizing=False)
        model.language_model = llm
    return model


def _pretrained(
    part: str, settings: BackboneSettings, model: PreTrainedModel, loader: Any
) -> PreTrainedModel:
    """The pretrained backbone, after checking that it has the architecture of the settings."""
    path = str(settings.pretrained)
    try:
        found = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise InputError(f"model.{part}.pretrained: cannot load {path}: {error}") from error
    found = getattr(found, "vision_config", found) if part == "vision" else found
    different = [
        f"{key} is {getattr(found, key, None)!r} there and {value!r} in model.{part}.config"
        for key, value in settings.config.items()
        if key not in ("vocab_size", "vision_use_head") and getattr(found, key, None) != value
    ]
    found_vocab = getattr(found, "vocab_size", 0) if part == "llm" else 0
    vocab_size = model.config.text_config.vocab_size
    if found_vocab > vocab_size:
        different.append(f"vocab_size is {found_vocab} there and {vocab_size} here")
    if different:
        raise InputError(
            f"model.{part}.pretrained={path} is another architecture: "
            f"{'; '.join(different)}. Correct model.{part}.config"
        )
    if part == "vision":
        found.vision_use_head = False
    return loader.from_pretrained(
        path,
        config=found,
        dtype=model.dtype,
        attn_implementation=model.config._attn_implementation,
    )
