"""Runs start from other projects' parts or from an exported model, or say what does not fit."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
)

from data_pipeline.errors import InputError
from data_pipeline.tokenizer import load_tokenizer
from tests.data_pipeline.small_tokenizers import save_hugging_face
from tests.ranks import RankPool
from tests.training import scenarios
from training.checkpoint import read_manifest
from training.export.hub_tokenizer import to_hub_tokenizer
from training.model.build import build_model
from training.start.pretrained_tokenizer import check_pretrained_tokenizer

SMALL_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 50,
}


def build(corpus: Path, *overrides: str) -> Any:
    config = scenarios.tiny_config(corpus, *overrides)
    return build_model(config, load_tokenizer(corpus / "tokenizer.model"))


def save_llm(corpus: Path, folder: Path, **changes: Any) -> Path:
    config = scenarios.tiny_config(corpus).model.llm.config
    fields = {**config, "vocab_size": 100, **changes}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields)).save_pretrained(folder)
    return folder


def test_weights_with_another_tokenizer_are_refused(digits_corpus: Path, tmp_path: Path) -> None:
    """Even where the vocabulary is no larger; what it does counts, not the name."""
    weights = save_llm(digits_corpus, tmp_path / "llm")
    tokenizer = load_tokenizer(digits_corpus / "tokenizer.model")
    config = scenarios.tiny_config(digits_corpus, f"model.llm.pretrained={weights}")
    check_pretrained_tokenizer(config, tokenizer)  # it comes with none
    save_hugging_face(weights)
    with pytest.raises(InputError, match=r"model\.llm\.pretrained=.* has another tokenizer than"):
        check_pretrained_tokenizer(config, tokenizer)
    check_pretrained_tokenizer(config, load_tokenizer(shutil.copytree(weights, tmp_path / "copy")))
    config.checkpoint.init_allow = ["data.tokenizer"]
    check_pretrained_tokenizer(config, tokenizer)


def test_the_tokenizer_of_an_exported_model_is_the_one_it_was_made_from(
    digits_corpus: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(digits_corpus / "tokenizer.model")
    context = tokenizer.special_id("<IMG_CONTEXT>")
    to_hub_tokenizer(tokenizer, context).save_pretrained(tmp_path)
    config = scenarios.tiny_config(digits_corpus, f"model.pretrained={tmp_path}")
    check_pretrained_tokenizer(config, tokenizer)


def test_a_siglip_checkpoint_of_both_towers_gives_the_vision_tower(
    digits_corpus: Path, tmp_path: Path
) -> None:
    vision = scenarios.tiny_config(digits_corpus).model.vision.config
    both = SiglipModel(SiglipConfig(vision_config=vision, text_config=SMALL_TEXT))
    both.save_pretrained(tmp_path)
    model = build(digits_corpus, f"model.vision.pretrained={tmp_path}")
    expected = both.vision_model.state_dict()
    for name, value in model.vision_model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_siglip2_of_native_resolution_is_refused(digits_corpus: Path, tmp_path: Path) -> None:
    vision = {**SMALL_TEXT, "num_patches": 64, "patch_size": 4}
    config = Siglip2Config(vision_config=vision, text_config=SMALL_TEXT)
    Siglip2Model(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"model\.vision\.pretrained=.*siglip2_vision_model"):
        build(digits_corpus, f"model.vision.pretrained={tmp_path}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05.* 1e-06"),
        ({"model_type": "llama"}, "model_type is 'llama'.*'qwen2'"),
        ({"num_key_value_heads": 4}, "num_key_value_heads is 4.* 2"),
    ],
)
def test_a_key_that_the_settings_leave_out_counts(
    digits_corpus: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = save_llm(digits_corpus, tmp_path, **change)
    with pytest.raises(InputError, match=rf"model\.llm\.pretrained=.*{message}"):
        build(digits_corpus, f"model.llm.pretrained={folder}")


@pytest.mark.parametrize(
    ("value", "message"),
    [(None, "lacks model.norm.weight"), (torch.ones(3), r"norm.weight .*\[3\] .*\[64\]")],
)
def test_tensors_that_do_not_fit_are_named(
    digits_corpus: Path, tmp_path: Path, value: Any, message: str
) -> None:
    file = save_llm(digits_corpus, tmp_path) / "model.safetensors"
    weights = load_file(file)
    del weights["model.norm.weight"]
    save_file(
        weights | ({} if value is None else {"model.norm.weight": value}), file, {"format": "pt"}
    )
    with pytest.raises(InputError, match=rf"model\.llm\.pretrained=.*{message}"):
        build(digits_corpus, f"model.llm.pretrained={tmp_path}")


@pytest.mark.multiprocess
def test_a_run_starts_from_a_whole_model(
    two_ranks: RankPool, digits_corpus: Path, tmp_path: Path
) -> None:
    build(digits_corpus, "seed=1").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    overrides = [f"model.pretrained={tmp_path}"]
    before, _ = two_ranks.run(scenarios.train_steps, digits_corpus, 0, overrides)[0]
    assert before.keys() == weights.keys()
    for name, value in weights.items():
        assert torch.equal(torch.from_numpy(before[name]), value), name


def test_a_whole_model_stands_for_its_parts(digits_corpus: Path, tmp_path: Path) -> None:
    build(digits_corpus, "seed=1").save_pretrained(tmp_path)
    parts = [f"model.{part}.pretrained=/nowhere" for part in ("vision", "llm")]
    model = build(digits_corpus, f"model.pretrained={tmp_path}", *parts)
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())


def test_another_model_is_refused(digits_corpus: Path, tmp_path: Path) -> None:
    build(digits_corpus).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"model\.pretrained=.*pool is 'adaptive'"):
        build(digits_corpus, f"model.pretrained={tmp_path}", "model.pool=resize")


def test_a_folder_of_something_else_is_told_by_what_it_is(
    digits_corpus: Path, tmp_path: Path
) -> None:
    for part in ("model", "model.llm", "model.vision"):
        with pytest.raises(InputError, match=rf"{part}\.pretrained=.*no config\.json.*init_from"):
            build(digits_corpus, f"{part}.pretrained={tmp_path}")
    llm = save_llm(digits_corpus, tmp_path / "llm")
    with pytest.raises(InputError, match=r"of model_type qwen2, not.*model\.llm\.pretrained"):
        build(digits_corpus, f"model.pretrained={llm}")
    with pytest.raises(InputError, match=r"a model, which model\.pretrained takes"):
        read_manifest(llm)
