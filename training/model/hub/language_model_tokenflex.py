"""The language model: its decoder and its head, and by what names earlier folders have them."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
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

_SOFT_CAPPED = ("gemma2", "gemma3_text", "vaultgemma")
_DIVIDED = ("granite", "granitemoe", "granitemoeshared", "granite_swa", "granitemoe_swa")
_MULTIPLIED = ("cohere", "cohere2")

# Config keys with which a language model's own forward changes the logits behind its head; the
# value that changes nothing; the models of which it is known how, as in `final_logits`.
_LOGIT_KEYS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "final_logit_softcapping": (None, _SOFT_CAPPED),
    "logits_soft_cap": (None, ()),
    "output_logit_soft_cap": (None, ()),
    "logit_scale": (1, _MULTIPLIED),
    "logits_scaling": (1, _DIVIDED),
    "lm_head_multiplier": (1, ()),
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
    """Raise ValueError where it is not known what becomes of the head's logits."""
    for key, (neutral, known) in _LOGIT_KEYS.items():
        value = getattr(text_config, key, None)
        if value not in (None, neutral) and text_config.model_type not in known:
            raise ValueError(
                f"text_config.{key} is {value}: the language model {text_config.model_type!r} "
                "changes its logits behind lm_head in a way that is not known here; use a language "
                f"model whose {key} is {neutral}"
            )


def final_logits(logits: Tensor, text_config: PreTrainedConfig) -> Tensor:
    """What the language model makes of its head's logits [..., V]: scaled, or softly capped."""
    kind = text_config.model_type
    if kind in _DIVIDED:
        return logits / text_config.logits_scaling
    if kind in _MULTIPLIED:
        return logits * text_config.logit_scale
    if kind in _SOFT_CAPPED and (cap := text_config.final_logit_softcapping) is not None:
        return cap * torch.tanh(logits / cap)
    return logits


def choose_attention(text_config: PreTrainedConfig) -> None:
    """Not sdpa where scores have a soft cap, which it leaves out or refuses, by release."""
    if getattr(text_config, "attn_logit_softcapping", None) is None:
        return
    if text_config._attn_implementation in (None, "sdpa"):
        text_config._attn_implementation = "eager"
