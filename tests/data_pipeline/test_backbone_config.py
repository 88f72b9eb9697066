"""Backbones' configs: a key or value that transformers would pass over is named."""

from typing import Any

import pytest

from data_pipeline.backbone_config import check_backbone
from data_pipeline.config_file import KeyProblems
from data_pipeline.errors import InputError
from data_pipeline.settings import DataConfig
from training.config import load_config, load_settings

# As Qwen/Qwen2.5-0.5B-Instruct and google/siglip-base-patch16-224 bring them.
QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "layer_norm_eps": 1e-6,
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "head_dim": 64,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "top_p": 0.9,
}


@pytest.mark.parametrize("config", [QWEN, SIGLIP, LLAMA], ids=["qwen2", "siglip", "llama"])
def test_the_config_of_a_real_model_is_taken(config: dict[str, Any]) -> None:
    assert check_backbone(dict(config)) == config


def test_a_key_that_only_the_code_of_the_model_asks_for_is_taken() -> None:
    assert check_backbone({**QWEN, "head_dim": 64})["head_dim"] == 64


@pytest.mark.parametrize(
    ("config", "changes", "key", "expected"),
    [
        (QWEN, {"num_hiden_layers": 2}, "num_hiden_layers", "did you mean num_hidden_layers"),
        (QWEN, {"qk_norm": True}, "qk_norm", "unknown key of Qwen2Config"),
        (SIGLIP, {"patchsize": 8}, "patchsize", "did you mean patch_size"),
        (QWEN, {"rope_parameters": {"rope_tetha": 1}}, "rope_parameters.rope_tetha", "theta"),
        (LLAMA, {"rope_scaling": {"type": "liner"}}, "rope_scaling.type", "one of .*linear"),
        (QWEN, {"rms_norm_eps": "1e-5"}, "rms_norm_eps", "expected float"),
        (QWEN, {"rms_norm_eps": float("nan")}, "rms_norm_eps", "finite"),
        (QWEN, {"initializer_range": -0.02}, "initializer_range", "above 0"),
        (QWEN, {"hidden_size": None}, "hidden_size", "expected int"),
        (QWEN, {"hidden_size": 0}, "hidden_size", "from 1 on"),
        (QWEN, {"num_attention_heads": 13}, "hidden_size", "multiple of num_attention_heads 13"),
        (QWEN, {"num_key_value_heads": 4}, "num_attention_heads", "num_key_value_heads 4"),
        (SIGLIP, {"patch_size": 448}, "image_size", "at least one patch"),
        (SIGLIP, {"hidden_act": "gelo"}, "hidden_act", "did you mean gelu"),
        (QWEN, {"model_type": "qwen22"}, "model_type", "did you mean qwen2"),
        (QWEN, {"model_type": None}, "model_type", "is required"),
    ],
)
def test_what_would_be_passed_over_is_named(
    config: dict[str, Any], changes: dict[str, Any], key: str, expected: str
) -> None:
    with pytest.raises(KeyProblems, match=f"{key}: .*{expected}"):
        check_backbone({**config, **changes})


@pytest.mark.parametrize("part", ["llm", "vision"])
@pytest.mark.parametrize("kind", ["trainer", "data tools"])
def test_trainer_and_data_tools_name_the_whole_key(part: str, kind: str) -> None:
    with pytest.raises(InputError, match=rf"model\.{part}\.config\.hiden_size: .*hidden_size"):
        overrides = [f"model.{part}.config.hiden_size=48"]
        if kind == "trainer":
            load_config("training/configs/digits.yaml", overrides)
        else:
            load_settings(DataConfig, "training/configs/digits.yaml", overrides)
