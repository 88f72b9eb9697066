"""FLOPs of samples, against counts made another way."""

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from data_pipeline.balance import DEFAULT_COST, CostModel
from data_pipeline.errors import InputError

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
LLM = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "tie_word_embeddings": True,
}


def linear_weights(model: torch.nn.Module) -> int:
    """Weights of the matrices that activations are multiplied with."""
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, kinds))


def test_default_is_the_written_formula() -> None:
    tokens, tiles = np.array([100, 8000]), np.array([0, 7])
    per_tile = 6 * 4e8 * 1024 + 12 * 27 * 1152 * 1024**2
    expected = [
        6 * 1.7e9 * t + 6 * 28 * 2048 * t**2 + n * per_tile for t, n in ((100, 0), (8000, 7))
    ]
    np.testing.assert_allclose(DEFAULT_COST.flops(tokens, tiles), expected, rtol=1e-14)


def test_parameters_from_configs_are_those_of_the_models() -> None:
    model = CostModel.from_configs(VISION, LLM)
    assert model.llm_parameters == linear_weights(Qwen2ForCausalLM(Qwen2Config(**LLM)))
    tower = SiglipVisionModel(SiglipVisionConfig(**VISION, vision_use_head=False))
    assert model.vision_parameters == linear_weights(tower)
    assert (model.llm_layers, model.llm_width) == (2, 64)
    assert (model.vision_layers, model.vision_width, model.patches_per_tile) == (3, 32, 16)


def test_a_tower_of_any_grid_has_tiles_as_its_positions() -> None:
    native = {k: v for k, v in VISION.items() if k != "image_size"} | {"num_patches": 16}
    assert CostModel.from_configs(native, LLM) == CostModel.from_configs(VISION, LLM)


def test_configs_of_other_kinds() -> None:
    wide_heads = LLM | {"head_dim": 16}
    assert CostModel.from_configs(VISION, wide_heads).llm_width == 128
    no_groups = {k: v for k, v in LLM.items() if k != "num_key_value_heads"}
    plain = no_groups | {"model_type": "gpt_neox"}
    expected = 2 * (4 * 64 * 64 + 2 * 64 * 96) + 64 * 100
    assert CostModel.from_configs(VISION, plain).llm_parameters == expected
    experts = LLM | {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
    dense = CostModel.from_configs(VISION, LLM | {"intermediate_size": 48})
    assert CostModel.from_configs(VISION, experts) == dense


def test_what_is_missing_or_wrong_is_named() -> None:
    with pytest.raises(InputError, match=r"vocab_size of the llm config .* None"):
        CostModel.from_configs(VISION, {k: v for k, v in LLM.items() if k != "vocab_size"})
    with pytest.raises(InputError, match=r"patch_size of the vision config .*'x'"):
        CostModel.from_configs(VISION | {"patch_size": "x"}, LLM)
    with pytest.raises(InputError, match=r"llm_layers .* -1"):
        CostModel(1, -1, 1, 1, 1, 1, 1)
