"""The language models that are tested: of each family a random one of a few thousand parameters."""

from dataclasses import dataclass, field
from typing import Any

WINDOW = 8
"""Tokens of a sliding window: shorter than most samples of the checks."""

_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,  # large enough for every path to matter in the outputs
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
_MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}


@dataclass(frozen=True)
class Family:
    """A kind of language model. models: what people know it by. note: what is special of it."""

    name: str
    models: str
    changes: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def text_config(self) -> dict[str, Any]:
        """The `model.llm.config` of its small model."""
        return {**_SIZES, **self.changes}


def _of(model_type: str, **changes: Any) -> dict[str, Any]:
    return {"model_type": model_type, **changes}


_LLAMA_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_GEMMA = {"query_pre_attn_scalar": 16, "tie_word_embeddings": True, **_MIXED}
_GRANITE = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.2,
    "logits_scaling": 4.0,
}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "decoder_sparse_step": 1,
}

FAMILIES = (
    Family("qwen2", "Qwen 2, Qwen 2.5", _of("qwen2")),
    Family(
        "qwen2-window",
        "the same with `use_sliding_window`",
        _of("qwen2", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
        "window in the upper layers",
    ),
    Family("qwen3", "Qwen 3", _of("qwen3"), "norms of queries and keys"),
    Family("llama3", "Llama 3, 3.1, 3.2", _of("llama", rope_parameters=_LLAMA_ROPE)),
    Family("smollm2", "SmolLM 2", _of("llama", tie_word_embeddings=True), "tied head"),
    Family(
        "smollm3", "SmolLM 3", _of("smollm3", no_rope_layers=[1, 0]), "layers without positions"
    ),
    Family(
        "smollm3-window",
        "the same with `use_sliding_window`",
        _of("smollm3", no_rope_layers=[1, 0], use_sliding_window=True, sliding_window=WINDOW),
        "window in the layers without positions",
    ),
    Family("mistral", "Mistral", _of("mistral", sliding_window=WINDOW), "window"),
    Family("phi3", "Phi 3, Phi 4", _of("phi3", sliding_window=WINDOW), "window; fused matrices"),
    Family(
        "gemma2",
        "Gemma 2",
        _of("gemma2", attn_logit_softcapping=5.0, final_logit_softcapping=3.0, **_GEMMA),
        "window in every other layer; scores and logits softly capped; scaled embedding",
    ),
    Family(
        "gemma3",
        "Gemma 3",
        _of("gemma3_text", **_GEMMA),
        "window in most layers; scaled embedding",
    ),
    Family("olmo2", "OLMo 2", _of("olmo2"), "norms behind attention and MLP"),
    Family("olmo3", "OLMo 3", _of("olmo3", **_MIXED), "window in most layers"),
    Family("glm4", "GLM 4", _of("glm4", partial_rotary_factor=0.5), "fused matrices"),
    Family(
        "granite",
        "Granite 3",
        _of("granite", **_GRANITE),
        "embedding, residuals, scores and logits scaled",
    ),
    Family("cohere2", "Command R7B", _of("cohere2", logit_scale=0.25, **_MIXED), "logits scaled"),
    Family("qwen3-moe", "Qwen 3 MoE", _of("qwen3_moe", **_EXPERTS), "mixture of experts"),
)

REFUSED = (
    Family(
        "qwen3.5",
        "Qwen 3.5",
        _of("qwen3_5_text", layer_types=["linear_attention", "full_attention"]),
    ),
    Family(
        "granite4-hybrid",
        "Granite 4 hybrid",
        _of(
            "granitemoehybrid",
            layer_types=["linear_attention", "full_attention"],
            mamba_n_heads=8,
            num_local_experts=0,
            shared_intermediate_size=48,
        ),
    ),
    Family(
        "falcon-h1",
        "Falcon H1",
        _of("falcon_h1", mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1),
    ),
    Family("gpt-oss", "gpt-oss", _of("gpt_oss", num_local_experts=2, num_experts_per_tok=1)),
)
"""Families that do not keep packed samples apart, or whose attention has what packs lack."""
