"""Which causal language models of transformers can be trained in packs with the loss in chunks.

Any family that `AutoModelForCausalLM` builds, unless a check here says why not. What it costs is in
`data_pipeline.balance.cost`, since planning knows nothing of models.
"""

from transformers import PreTrainedConfig

from data_pipeline.errors import InputError
from training.model.attention import ATTENTION_NAME
from training.model.hub import language_model_tokenflex
from training.model.segments import PackedSegments

_PACKABLE_LAYERS = ("full_attention", "sliding_attention")


def check_logits(text_config: PreTrainedConfig) -> None:
    """Raise InputError where the logits are not lm_head's, which the chunked loss takes."""
    try:
        language_model_tokenflex.check_logits(text_config)
    except ValueError as error:
        raise InputError(str(error)) from error


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
