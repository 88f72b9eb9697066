"""Which causal language models of transformers can be trained in packs with the loss in chunks.

Any family that `AutoModelForCausalLM` builds, unless a check here says why not;
`training.language_model_table` runs those that were tested. What one costs is in
`data_pipeline.balance.cost`, since planning knows nothing of models.
"""

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from data_pipeline.balance.cost import windowed_layers
from data_pipeline.errors import InputError
from training.model.attention import ATTENTION_NAME
from training.model.hub import language_model_tokenflex
from training.model.segments import PackedSegments

_PACKABLE_LAYERS = ("full_attention", "sliding_attention")
# Kinds of rotary embedding whose frequencies follow the longest position of all.
_BY_LONGEST = ("longrope", "dynamic")


def check_logits(text_config: PreTrainedConfig) -> None:
    """Raise InputError where the logits are not what the chunked loss makes of lm_head's."""
    try:
        language_model_tokenflex.check_logits(text_config)
    except ValueError as error:
        raise InputError(str(error)) from error


def check_layers(text_config: PreTrainedConfig) -> None:
    """Raise InputError for kinds of layers that do not keep the samples of a pack apart."""
    layers = set(getattr(text_config, "layer_types", None) or []).difference(_PACKABLE_LAYERS)
    if layers:
        raise InputError(
            f"the language model {text_config.model_type!r} has {', '.join(sorted(layers))} in "
            "text_config.layer_types: such layers do not keep packed samples apart; use a model "
            f"with {' and '.join(_PACKABLE_LAYERS)} only"
        )
    if getattr(text_config, "use_bidirectional_attention", None):
        raise InputError(
            "text_config.use_bidirectional_attention is set: packed samples need a causal language "
            "model; leave it out"
        )


def check_modules(causal: PreTrainedModel) -> None:
    """Raise InputError for a module that mixes samples, or attends in a way that packs lack."""
    for name, module in causal.named_modules():
        if isinstance(getattr(module, "sinks", None), nn.Parameter):
            raise InputError(
                f"the language model {causal.config.model_type!r} has attention sinks ({name}), "
                "which packs do not support; use another language model"
            )
        if isinstance(module, nn.Conv1d | nn.LSTM | nn.GRU):
            raise InputError(
                f"the language model {causal.config.model_type!r} has {type(module).__name__} as "
                f"{name}, which does not stop where a packed sample ends; use a language model "
                "with attention alone"
            )


def check_isolation(text_config: PreTrainedConfig, segments: PackedSegments) -> None:
    """Raise InputError if a pack just ran through layers that do not keep samples apart."""
    check_layers(text_config)
    _check_positions(text_config, segments.max_seqlen)
    if text_config._attn_implementation != ATTENTION_NAME:
        return
    if not segments.used:
        raise InputError(
            f"the language model {text_config.model_type!r} does not hand extra arguments to "
            "its attention, so packed samples would see each other; use one that supports "
            "attention backends"
        )
    window = windowed_layers(vars(text_config))[1]
    if window and window < segments.max_seqlen and window not in segments.windows:
        raise InputError(
            f"the language model {text_config.model_type!r} does not hand its sliding_window of "
            f"{window} tokens to its attention, and a sample has {segments.max_seqlen}; lower the "
            "pack's max_tokens, raise text_config.sliding_window or use another language model"
        )
    softcap = getattr(text_config, "attn_logit_softcapping", None)
    if softcap is not None and softcap not in segments.softcaps:
        raise InputError(
            f"the language model {text_config.model_type!r} does not hand its "
            f"attn_logit_softcapping of {softcap} to its attention; use another language model"
        )


def _check_positions(text_config: PreTrainedConfig, longest: int) -> None:
    """Raise InputError where a long sample of a pack would change the others' positions."""
    rope = getattr(text_config, "rope_parameters", None) or {}
    by_layer = [part for part in rope.values() if isinstance(part, dict)]
    for part in by_layer or [rope]:
        if part.get("rope_type") not in _BY_LONGEST:
            continue
        limit = part.get("original_max_position_embeddings") or text_config.max_position_embeddings
        if longest > limit:
            raise InputError(
                f"the language model's rope_type is {part['rope_type']!r}, whose positions from "
                f"{limit} tokens on change with the longest sample of a pack, and a sample has "
                f"{longest}; set data.pack.max_tokens to at most {limit}"
            )
