"""The language model: its decoder and its head, and by what names earlier folders have them."""

import re
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

# What causal language models call their decoder and their head.
_DECODERS = ("model", "transformer", "gpt_neox")
_HEADS = ("lm_head", "embed_out")

EARLIER_NAMES = {
    r"^vision_model\.": "model.vision_model.",
    r"^projector\.": "model.projector.",
    rf"^language_model\.(?:{'|'.join(_DECODERS)})\.": "model.language_model.",
    rf"^language_model\.(?:{'|'.join(_HEADS)})\.": "lm_head.",
}
"""Beginnings of parameters' names in the trainer's checkpoints, and in folders exported before the
model had a base model, as patterns -> as `TokenFlexForConditionalGeneration` has them."""

# Config keys with which a language model's own forward changes the logits behind its head, and the
# values that change nothing.
_LOGIT_KEYS: dict[str, tuple[Any, ...]] = {
    "final_logit_softcapping": (None,),
    "logits_soft_cap": (None,),
    "output_logit_soft_cap": (None,),
    "logit_scale": (None, 1),
    "logits_scaling": (None, 1),
    "lm_head_multiplier": (None, 1),
}


def renamed(name: str, names: Mapping[str, str]) -> str:
    """A parameter's name with its beginning replaced by the first pattern that fits."""
    for pattern, beginning in names.items():
        name, found = re.subn(pattern, beginning, name)
        if found:
            break
    return name


def trainer_names(text_config: PreTrainedConfig) -> dict[str, str]:
    """The inverse of `EARLIER_NAMES` for the models of a text config."""
    causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(text_config)]
    decoder = causal.base_model_prefix
    return {
        r"^model\.vision_model\.": "vision_model.",
        r"^model\.projector\.": "projector.",
        r"^model\.language_model\.": f"language_model.{decoder}.",
        r"^lm_head\.": "language_model.lm_head.",
    }


def decoder_and_head(causal: PreTrainedModel) -> tuple[PreTrainedModel, nn.Module]:
    """The two parts of a causal language model; ValueError if it has others or changes logits."""
    check_logits(causal.config)
    parts: dict[str, Any] = dict(causal.named_children())
    head = causal.get_output_embeddings()
    decoders = [part for name, part in parts.items() if name in _DECODERS]
    if len(parts) != 2 or len(decoders) != 1 or not any(part is head for part in parts.values()):
        raise ValueError(
            f"text_config.model_type is {causal.config.model_type!r}, whose parts are "
            f"{', '.join(parts)}; use a language model of a decoder ({', '.join(_DECODERS)}) and "
            "a head"
        )
    return decoders[0], head


def check_logits(text_config: PreTrainedConfig) -> None:
    """Raise ValueError where the logits are not what the head makes of the hidden states."""
    for key, neutral in _LOGIT_KEYS.items():
        value = getattr(text_config, key, None)
        if value not in neutral:
            raise ValueError(
                f"text_config.{key} is {value}: this language model changes its logits behind "
                "lm_head, which is not done here; use a language model whose "
                f"{key} is {neutral[-1]}"
            )
