"""Configuration: every preset loads, overrides apply, every problem is named with its key."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from data_pipeline.config_file import load_settings
from data_pipeline.errors import InputError
from data_pipeline.settings import DataConfig
from training.config import DeepSpeedSettings, FaultSettings, load_config, save_config
from training.train import parse_args

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
        "stage3_lora",
        "ristretto_3b",
    }


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_preset_loads_and_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


def test_a_config_that_cannot_be_written_whole_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = tmp_path / "config.yaml"
    save_config(load_config(DIGITS), saved)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        save_config(load_config(DIGITS, ["seed=7"]), saved)
    assert load_config(saved) == load_config(DIGITS) and [*tmp_path.iterdir()] == [saved]


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
        ("steps=7", r"steps: unknown key; did you mean train\.steps"),
        (
            "train.lr=7",
            r"train\.lr: .*train\.modules\.vision_model\.lr or train\.modules\.projector",
        ),
        ("max_tokens=7", r"max_tokens: .*data\.pack\.max_tokens or eval\.max_tokens\?"),
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


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.steps=yes", r"train\.steps: expected a number"),
        ("data.tokens.counts=[4, true, 64]", r"data\.tokens\.counts: expected a number"),
        ("train.steps=", r"train\.steps: .*found nothing"),
        ("train.steps=.nan", r"train\.steps: .*finite"),
        ("checkpoint.resume=no", r"checkpoint\.resume: expected auto, never, .* \(found False\)"),
        ("train.modules.vision_model.train=new_tokens", r"vision_model\.train: .*boolean"),
        (
            "train.modules.language_model.train=rows",
            r"1 problem:\n.*language_model\.train: expected .* new_tokens \(found 'rows'",
        ),
        (
            "train.gradient_checkpointing=[projector]",
            r"1 problem:\n.*gradient_checkpointing: expected .*vision_model.*projector_backward",
        ),
        ("train.modules.projector.lr=.inf", r"train\.modules\.projector\.lr: .*finite"),
        ("train.modules.projector.lr=nan", r"train\.modules\.projector\.lr: .*finite"),
        ("train.betas=[0.9, 1]", r"train\.betas\.1: .*less than 1"),
        ("seed=1e22", r"seed: "),
        ("data.eval_shards=data/x", r"data\.eval_shards: .*list.*write \[data/x\]"),
        ("data.tokens.counts=", r"data\.tokens\.counts: .*found nothing"),
        ("data.tokenizer=7", r"data\.tokenizer: .*quotes"),
        ("data.chat.system=off", r"data\.chat\.system: .*quotes"),
        ("data.chat.system=You are #1.", r"data\.chat\.system=.*comment"),
        ('output_dir=""', r"output_dir: .*empty"),
        ("faults.step_timeout_s=1e12", r"faults\.step_timeout_s: .*less than or equal"),
        ("train={steps: 7, steps: 8}", r"steps is written twice"),
        ("data.tokenizer=*", r"data\.tokenizer=\*.*not valid YAML"),
    ],
)
def test_a_value_that_cannot_be_meant_is_named(override: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        load_config(DIGITS, [override])


def test_steps_and_epochs_take_each_others_place(tmp_path: Path) -> None:
    assert DIGITS.read_text().count("steps: 1200") == 1
    for overrides, expected in (
        (["train.epochs=0.5"], (0, 0.5)),
        (["train={epochs: 2, log_every: 1}"], (0, 2)),
        (["train.epochs=2", "train.steps=7"], (7, None)),
        (["train={epochs: 2, steps: 7}"], (7, 2)),
        (["train.epochs=null"], (1200, None)),
    ):
        train = load_config(DIGITS, overrides).train
        assert (train.steps, train.epochs) == expected, overrides
        read = load_settings(DataConfig, DIGITS, overrides)
        assert read.train.epochs == expected[1]
    neither = tmp_path / "neither.yaml"
    neither.write_text(DIGITS.read_text().replace("steps: 1200", "epochs:"))
    with pytest.raises(InputError, match=r"train: give steps, or epochs"):
        load_config(neither)
    for value in ("0", "-1", ".inf", "true"):
        with pytest.raises(InputError, match=r"train\.epochs: "):
            load_config(DIGITS, [f"train.epochs={value}"])


def test_settings_that_contradict_each_other_are_named() -> None:
    with pytest.raises(InputError, match=r"eval\.every_steps is 9 but data\.eval_shards is empty"):
        load_config(DIGITS, ["eval.every_steps=9", "data.eval_shards=[]"])


def test_numbers_are_read_as_they_are_meant(tmp_path: Path) -> None:
    text = DIGITS.read_text().replace(
        "initializer_range: 0.1", "initializer_range: 0.1, rms_norm_eps: 3e-6"
    )
    text = text.replace("initializer_range: 0.1, rms", "initializer_range: 0.1\n      rms")
    (tmp_path / "run.yaml").write_text(text)
    config = load_config(
        tmp_path / "run.yaml", ["train.modules.projector.lr=2e-4", "train.steps=1_500"]
    )
    assert config.model.llm.config["rms_norm_eps"] == 3e-6
    assert (config.train.modules.projector.lr, config.train.steps) == (2e-4, 1500)
    assert load_config(DIGITS, ["checkpoint.every_steps=2e2"]).checkpoint.every_steps == 200


def test_a_key_written_twice_is_refused_with_both_lines(tmp_path: Path) -> None:
    lines = len(DIGITS.read_text().splitlines())
    first = DIGITS.read_text().splitlines().index("train:") + 1
    (tmp_path / "twice.yaml").write_text(DIGITS.read_text() + "train: {steps: 7}\n")
    with pytest.raises(InputError, match=rf"train is written twice \(line {first} and {lines + 1}"):
        load_config(tmp_path / "twice.yaml")


def test_an_empty_section_has_its_defaults(tmp_path: Path) -> None:
    text = "\n".join(
        line for line in DIGITS.read_text().splitlines() if not line.startswith("deepspeed")
    )
    (tmp_path / "empty.yaml").write_text(text + "\ndeepspeed:\nfaults: ~\n")
    config = load_config(tmp_path / "empty.yaml")
    assert config.deepspeed == DeepSpeedSettings() and config.faults == FaultSettings()
    more = load_config(tmp_path / "empty.yaml", ["deepspeed.extra=", "faults.spike_sigma=2"])
    assert more.deepspeed.extra == {} and more.faults.spike_sigma == 2
    assert load_config(DIGITS, ["data.eval_shards="]).data.eval_shards == []


def test_an_override_adds_to_a_section_and_the_last_one_counts() -> None:
    config = load_config(DIGITS, ["train={steps: 5, modules: {projector: {lr: 1}}}"])
    assert (config.train.steps, config.train.log_every) == (5, 50)
    assert config.train.modules.projector.lr == 1
    assert config.train.modules.vision_model.lr == 2e-3
    assert load_config(DIGITS, ["train.steps=5", "train.steps=6"]).train.steps == 6
    extra = ["deepspeed.extra={a: 1}", "deepspeed.extra={b: 2}"]
    assert load_config(DIGITS, extra).deepspeed.extra == {"b": 2}  # a dictionary is a value


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


def test_settings_with_dashes_are_told_how_to_be_written(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for words in (["--train.steps=3"], ["--learning_rate", "1e-4"]):
        with pytest.raises(SystemExit) as end:
            parse_args(["config.yaml", *words])
        assert end.value.code == 2
        assert words[0] in (told := capsys.readouterr().err) and "without dashes" in told


def test_the_file_of_the_trainer_says_how_to_start_it() -> None:
    command = [sys.executable, "training/train.py", "config.yaml"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and "python -m training.train" in result.stderr
