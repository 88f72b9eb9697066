"""Configuration: every preset loads, overrides apply, every problem is named with its key."""

from pathlib import Path

import pytest
import yaml

from data_pipeline.errors import InputError
from training.config import load_config, save_config

PRESETS = sorted(Path("training/configs").glob("*.yaml"))
DIGITS = Path("training/configs/digits.yaml")


def test_the_presets_are_those_the_readme_names() -> None:
    names = {path.stem for path in PRESETS}
    assert names == {
        "digits",
        "grid",
        "stage1_align",
        "stage2_pretrain",
        "stage3_finetune",
        "ristretto_3b",
    }


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_preset_loads_and_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


def test_overrides_are_yaml_values() -> None:
    config = load_config(
        DIGITS,
        [
            "train.steps=7",
            "data.tokens.counts=[1, 9]",
            "data.tokens.probabilities=[0.5, 0.5]",
            "train.modules.vision_model.train=false",
            "deepspeed.extra.zero_optimization.overlap_comm=true",
        ],
    )
    assert config.train.steps == 7
    assert config.data.tokens.sides == [1, 3]
    assert not config.train.modules.vision_model.train
    assert config.deepspeed.extra == {"zero_optimization": {"overlap_comm": True}}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.stepz=7", r"train\.stepz: .*steps\?"),
        ("nonsense.key=7", r"nonsense: .*output_dir"),
        ("train.steps=0", r"train\.steps: .*greater than 0.*found 0"),
        ("data.tokens.counts=[4, 15, 64]", r"data\.tokens.*15.*(9|16)"),
        (
            "data.tiling.tile_size=64",
            r"tile_size is 64 but .*image_size is 32",
        ),
        ("model.pool=max", r"model\.pool: expected one of adaptive, resize \(found 'max'\)"),
        ("train.loss_weighting=half", r"train\.loss_weighting: .*one of token, sample, sqrt"),
        ("train.steps", r"expected key\.sub=value"),
        ("train.steps.more=1", r"train\.steps is a value, not a section"),
        (
            "train.modules={vision_model: {train: false}, projector: {train: false}, "
            "language_model: {train: false}}",
            r"train\.modules: every module is frozen",
        ),
    ],
)
def test_a_wrong_setting_is_named(override: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        load_config(DIGITS, [override])


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(InputError, match=r"(?s)3 problems.*train\.steps.*train\.eps.*checkpoint"):
        load_config(DIGITS, ["train.steps=-1", "train.eps=0", "checkpoint.keep=0"])


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*missing\.yaml"):
        load_config(tmp_path / "missing.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1, 2")
    with pytest.raises(InputError, match=r"broken\.yaml is not valid YAML"):
        load_config(broken)
    broken.write_text("- a\n- b\n")
    with pytest.raises(InputError, match="must hold a mapping"):
        load_config(broken)
    raw = yaml.safe_load(DIGITS.read_text())
    del raw["data"]["shards"]
    broken.write_text(yaml.safe_dump(raw))
    with pytest.raises(InputError, match=r"data: .*shards.*datasets"):
        load_config(broken)
