"""Which causal language models of transformers can be trained in packs with the loss in chunks.

Any family that `AutoModelForCausalLM` builds, unless a check here says why not. What it costs is in
`data_pipeline.balance.cost`, since planning knows nothing of models.
"""

from typing import Any

from transformers import PreTrainedConfig

from data_pipeline.errors import InputError
from training.model.attention import ATTENTION_NAME
from training.model.segments import PackedSegments

_PACKABLE_LAYERS = ("full_attention", "sliding_attention")

# Config keys with which a language model's own forward changes the logits behind lm_head, and the
# values that change nothing. The loss calls lm_head directly, so any other value would silently
# train a different model.
_LOGIT_KEYS: dict[str, tuple[Any, ...]] = {
    "final_logit_softcapping": (None,),
    "logits_soft_cap": (None,),
    "output_logit_soft_cap": (None,),
    "logit_scale": (None, 1),
    "logits_scaling": (None, 1),
    "lm_head_multiplier": (None, 1),
}


def check_logits(text_config: PreTrainedConfig) -> None:
    """Raise InputError where the logits are not lm_head's, which the chunked loss takes."""
    for key, neutral in _LOGIT_KEYS.items():
        value = getattr(text_config, key, None)
        if value not in neutral:
            raise InputError(
                f"text_config.{key} is {value}: this language model changes its logits behind "
                "lm_head, which the chunked loss does not; use a language model whose "
                f"{key} is {neutral[-1]}"
            )


def check_isolation(text_config: PreTrainedConfig, segments: PackedSegments) -> None:
    """Raise InputError if a pack just ran through layers that do not keep samples apart."""
    layers = set(getattr(text_config, "layer_types", None) or []).difference(_PACKABLE_LAYERS)
    if layers:
        raise InputError(
            f"text_config.layer_types has {', '.join(sorted(layers))}: such layers do not keep "
            f"packed samples apart; use a model with {' and '.join(_PACKABLE_LAYERS)} only"
        )
    if text_config._attn_implementation == ATTENTION_NAME and not segments.used:
        raise InputError(
            f"the language model {text_config.model_type!r} does not hand extra arguments to "
            "its attention, so packed samples would see each other; use one that supports "
            "attention backends"
        )
