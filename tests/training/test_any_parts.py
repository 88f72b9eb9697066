"""Any tower with any decoder, each from a folder of its own, its architecture read from there."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, CLIPConfig, CLIPModel

from data_pipeline.config_file import load_settings
from data_pipeline.errors import InputError
from data_pipeline.settings import DataConfig
from data_pipeline.tokenizer import SPECIAL_TOKENS, load_tokenizer
from tests.ranks import RankPool
from tests.training import start_scenarios
from tests.training.scenarios import DIGITS, tiny_overrides
from tests.training.test_flops import pack
from training.config import load_config
from training.model.build import build_model
from training.model.hub.vision_towers_tokenflex import FAMILIES
from training.parameters import freeze
from training.train import train

TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
TOWER |= {"num_attention_heads": 2, "patch_size": 4}
TILE = 24
DECODERS: dict[str, dict[str, Any]] = {
    "qwen2": {"tie_word_embeddings": True, "num_key_value_heads": 2},
    "llama": {"tie_word_embeddings": False, "num_key_value_heads": 4},
    "gpt_neox": {"tie_word_embeddings": False, "rotary_pct": 0.5},
}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 512, "initializer_range": 0.1}


def save_tower(folder: Path, kind: str) -> Path:
    """The tower's weights as hubs have them; CLIP's beside those of its text side."""
    torch.manual_seed(0)
    native = kind == "siglip2_vision_model"
    size = {"num_patches": (TILE // TOWER["patch_size"]) ** 2} if native else {"image_size": TILE}
    config = AutoConfig.for_model(kind, **TOWER, **size)
    if kind == "clip_vision_model":
        text = {**SIZES, "vocab_size": 50, "num_attention_heads": 2}
        CLIPModel(CLIPConfig(vision_config=config.to_dict(), text_config=text)).save_pretrained(
            folder
        )
    else:
        FAMILIES[kind].model_class._from_config(FAMILIES[kind].complete(config)).save_pretrained(
            folder
        )
    return folder


def save_decoder(folder: Path, kind: str, vocab_size: int) -> Path:
    torch.manual_seed(1)
    config = AutoConfig.for_model(kind, **SIZES, **DECODERS[kind], vocab_size=vocab_size)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def two_lines(folder: Path, tower: Path | str, decoder: Path | str, **more: Any) -> Path:
    """The demo's settings, of its model only where the weights are."""
    settings = yaml.safe_load(Path(DIGITS).read_text())
    del settings["data"]["tiling"], settings["data"]["prepare"]
    settings["model"] = {
        "vision": {"pretrained": str(tower)},
        "llm": {"pretrained": str(decoder)},
    }
    settings |= more
    file = folder / "two_lines.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def overrides(corpus: Path, *more: str) -> list[str]:
    """Those of the tests' small runs that are not of the architecture."""
    kept = [text for text in tiny_overrides(corpus) if not text.startswith("model.")]
    return [*(text for text in kept if "prepare" not in text), *more]


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("tower", FAMILIES)
def test_two_lines_give_a_model(
    digits_corpus: Path, tmp_path: Path, tower: str, decoder: str
) -> None:
    markers = start_scenarios.without_markers(digits_corpus / "tokenizer.model", tmp_path)
    tokenizer = load_tokenizer(markers)
    known = tokenizer.vocab_size - len(SPECIAL_TOKENS)
    vision = save_tower(tmp_path / "tower", tower)
    llm = save_decoder(tmp_path / "decoder", decoder, known)
    settings = overrides(digits_corpus, f"data.tokenizer={markers}", "output_dir=unused")
    file = two_lines(tmp_path, vision, llm)
    config = load_config(file, settings)
    assert config.data.tiling.tile_size == TILE
    assert load_settings(DataConfig, file, settings).data.tiling == config.data.tiling
    model: Any = build_model(config, tokenizer)
    # The weights are those of the folders, and rows of new tokens the mean of the others.
    weights = load_file(vision / "model.safetensors")
    for name, value in model.vision_model.state_dict().items():
        found = [v for n, v in weights.items() if n.endswith(name)]
        assert any(torch.equal(value, each) for each in found), name
    weights = dict(AutoModelForCausalLM.from_pretrained(llm).named_parameters())
    for name, value in model.language_model.named_parameters():
        assert torch.equal(value[: len(weights[name])], weights[name]), name
        if len(value) > len(weights[name]):
            mean = weights[name].double().mean(0).expand(len(SPECIAL_TOKENS), -1)
            torch.testing.assert_close(value[known:].double(), mean, rtol=0, atol=1e-6)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == DECODERS[decoder]["tie_word_embeddings"]
    # And they train: the tower, the projector, every row.
    freeze(model, config.train.modules)
    inputs: dict[str, Any] = pack([4, 2])
    image = model.config.image_token_id
    new = torch.tensor([i for i in range(known, known + len(SPECIAL_TOKENS)) if i != image])
    inputs["input_ids"][inputs["input_ids"] == 7] = image
    inputs["input_ids"][0, -8:] = new.repeat(2)
    inputs["labels"][0, -7:] = inputs["input_ids"][0, -7:]
    inputs["pixel_values"] = inputs["pixel_values"][:, :, :24, :24]
    model.train()(**inputs).loss.backward()
    for name, value in model.named_parameters():
        if "post_layernorm" in name and tower == "clip_vision_model":
            continue  # it is of the class token alone
        assert value.grad is not None and torch.isfinite(value.grad).all(), name
    assert model.get_output_embeddings().weight.grad[known:].any(1).all()


@pytest.mark.multiprocess
def test_a_run_goes_on_where_the_folders_are_gone(
    digits_corpus: Path, one_rank: RankPool, tmp_path: Path
) -> None:
    vocabulary = load_tokenizer(digits_corpus / "tokenizer.model").vocab_size
    vision = save_tower(tmp_path / "tower", "siglip_vision_model")
    llm = save_decoder(tmp_path / "decoder", "llama", vocabulary)
    file = two_lines(tmp_path, vision, llm)
    settings = ["train.precision=fp32", "data.eval_shards=[]", "data.pack.max_tokens=256"]
    settings = [*settings, f"output_dir={tmp_path / 'run'}", "checkpoint.every_steps=1"]
    first = overrides(digits_corpus, *settings, "train.steps=1")
    assert one_rank.run(start_and_end, file, first)[0] == (0, 1)
    shutil.rmtree(vision)
    shutil.rmtree(llm)
    nulls = ["model.vision.pretrained=null", "model.llm.pretrained=null"]
    more = overrides(digits_corpus, *settings, "train.steps=2", "train.extend=stretch")
    for given in ([], nulls):
        config = load_config(file, [*more, *given])
        assert config.model.llm.config["model_type"] == "llama"
    assert one_rank.run(start_and_end, file, [*more, *nulls])[0] == (0, 2)


def start_and_end(ranks: Any, file: Path, overrides: list[str]) -> tuple[int, int]:
    """The exit code of a run, and its last step."""
    from training.metrics import read_metrics

    config = load_config(file, overrides)
    code = train(config, ranks)
    return code, int(read_metrics(config.output_dir / "metrics.jsonl")[-1]["step"])


def test_a_folder_without_an_architecture_is_named(digits_corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    vision = save_tower(tmp_path / "tower", "siglip_vision_model")
    settings = overrides(digits_corpus, f"output_dir={tmp_path / 'run'}")
    for missing, cause in (("empty", "config"), ("nowhere", "does not exist")):
        file = two_lines(tmp_path, vision, tmp_path / missing)
        with pytest.raises(InputError, match=rf"model\.llm\.pretrained: its architecture.*{cause}"):
            load_config(file, settings)
    file = two_lines(
        tmp_path, vision, tmp_path, model={"vision": {"pretrained": str(vision)}, "llm": {}}
    )
    with pytest.raises(InputError, match=r"model\.llm\.config: is required where pretrained"):
        load_config(file, settings)
    wrong = save_decoder(tmp_path / "wrong", "llama", 100)
    file = two_lines(tmp_path, wrong, wrong)
    with pytest.raises(InputError, match=r"tile_size is 384 .*image_size is None"):
        load_config(file, settings)
