"""Models from settings: every preset builds, pretrained parts are loaded and checked."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, SiglipVisionModel

from data_pipeline.errors import InputError
from data_pipeline.tokenizer import load_tokenizer
from tests.ranks import RankPool
from tests.training import scenarios
from training.config import load_config
from training.model import PackedTokenFlex
from training.model.build import build_model, model_config

PRESETS = sorted(Path("training/configs").glob("*.yaml"))
PARAMETERS = {  # vision tower, projector, language model
    "digits": (107_328, 37_440, None),
    "grid": (234_720, 83_808, None),
    "stage1_align": (412_987_248, 20_361_728, 7_615_616_512),
    "stage2_pretrain": (412_987_248, 20_361_728, 7_615_616_512),
    "stage3_finetune": (412_987_248, 20_361_728, 7_615_616_512),
    "stage3_lora": (412_987_248, 20_361_728, 7_615_616_512),
    "ristretto_3b": (412_987_248, 15_051_776, 3_085_938_688),
}


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_preset_builds_with_the_expected_sizes(path: Path) -> None:
    config = load_config(path)
    with torch.device("meta"):
        model = PackedTokenFlex._from_config(
            model_config(config.model, vocab_size=300, image_token_id=2), dtype=torch.bfloat16
        )
    parts = (model.vision_model, model.projector, model.language_model)
    for part, expected in zip(parts, PARAMETERS[path.stem], strict=True):
        if expected is not None:
            assert sum(p.numel() for p in part.parameters()) == expected
    side = config.model.vision.config["image_size"] // config.model.vision.config["patch_size"]
    assert model.projector.grid == (side, side)


def test_the_vocabulary_grows_to_the_tokenizer() -> None:
    settings = load_config("training/configs/digits.yaml").model
    assert model_config(settings, 999, 2).text_config.vocab_size == 999
    settings.llm.config["vocab_size"] = 2000
    assert model_config(settings, 999, 2).text_config.vocab_size == 2000


def test_an_unknown_architecture_is_named() -> None:
    settings = load_config("training/configs/digits.yaml").model
    settings.llm.config["model_type"] = "qwen99"
    with pytest.raises(InputError, match="qwen99"):
        model_config(settings, 300, 2)


def test_what_transformers_cannot_build_is_an_input_error(digits_corpus: Path) -> None:
    config = scenarios.tiny_config(digits_corpus, "model.llm.config.pad_token_id=99999")
    with pytest.raises(InputError, match=r"model\.llm\.config: Padding_idx"):
        build_model(config, load_tokenizer(config.data.tokenizer))


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vision tower and a language model as another project would have saved them."""
    folder = tmp_path_factory.mktemp("backbones")
    settings = load_config("training/configs/digits.yaml").model
    torch.manual_seed(7)
    vision = {"num_hidden_layers": 1, "vision_use_head": False}
    SiglipVisionModel(AutoConfig.for_model(**{**settings.vision.config, **vision})).save_pretrained(
        folder / "vision"
    )
    text = {"num_hidden_layers": 2, "vocab_size": 100}
    AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**{**settings.llm.config, **text})
    ).save_pretrained(folder / "llm")
    return folder


@pytest.mark.multiprocess
def test_pretrained_parts_are_loaded_partitioned(
    two_ranks: RankPool, digits_corpus: Path, backbones: Path
) -> None:
    overrides = [
        "train.precision=fp32",
        f"model.vision.pretrained={backbones / 'vision'}",
        f"model.llm.pretrained={backbones / 'llm'}",
    ]
    before, _ = two_ranks.run(scenarios.train_steps, digits_corpus, 0, overrides)[0]
    vision = SiglipVisionModel.from_pretrained(backbones / "vision").state_dict()
    for name, value in vision.items():
        assert torch.equal(torch.from_numpy(before[f"vision_model.{name}"]), value), name
    llm = AutoModelForCausalLM.from_pretrained(backbones / "llm").state_dict()
    for name, value in llm.items():
        found = torch.from_numpy(before[f"language_model.{name}"])
        assert torch.equal(found[: len(value)], value), name
    # The language model's vocabulary of 100 has grown to the tokenizer's.
    assert len(before["language_model.lm_head.weight"]) > 300


@pytest.mark.multiprocess
def test_pretrained_parts_are_in_training_mode(
    one_rank: RankPool, digits_corpus: Path, backbones: Path
) -> None:
    overrides = [
        f"model.vision.pretrained={backbones / 'vision'}",
        f"model.llm.pretrained={backbones / 'llm'}",
    ]
    assert one_rank.run(scenarios.modes, digits_corpus, overrides) == [True]


@pytest.mark.multiprocess
def test_pretrained_parts_of_another_shape_are_refused(
    one_rank: RankPool, digits_corpus: Path, backbones: Path
) -> None:
    overrides = [
        f"model.llm.pretrained={backbones / 'llm'}",
        "model.llm.config.hidden_size=32",
    ]
    with pytest.raises(
        AssertionError, match=r"(?s)InputError: model\.llm\.pretrained.*hidden_size is 64"
    ):
        one_rank.run(scenarios.train_steps, digits_corpus, 0, overrides)
