"""Paths in settings and behind options: what a shell would have replaced is replaced."""

import argparse
from pathlib import Path

import pytest

from data_pipeline.errors import InputError
from data_pipeline.paths import expand_path, path_argument
from data_pipeline.settings import DataConfig
from training.config import load_config, load_settings

DIGITS = "training/configs/digits.yaml"


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/homes/ada")
    monkeypatch.setenv("SCRATCH", "/scratch/ada")
    monkeypatch.delenv("NOWHERE", raising=False)


def test_home_and_variables_are_replaced() -> None:
    assert expand_path("~/runs") == "/homes/ada/runs"
    assert expand_path("$SCRATCH/a_${SCRATCH}") == "/scratch/ada/a_/scratch/ada"
    assert expand_path("s3://bucket/a~b/{000..003}.tar") == "s3://bucket/a~b/{000..003}.tar"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("${NOWHERE}/x", "NOWHERE, which is not set"),
        ("~nobody-of-this-name/x", "a user who is not known"),
        ("", "an empty text"),
    ],
)
def test_what_cannot_be_replaced_is_an_error(text: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        expand_path(text)
    with pytest.raises(argparse.ArgumentTypeError, match=expected):
        path_argument(text)


PATHS = {
    "output_dir": "{}",
    "data.prepare.out": "{}",
    "data.shards": "[{}]",
    "data.eval_shards": "[{}]",
    "data.index_dir": "{}",
    "data.tokenizer": "{}",
    "model.pretrained": "{}",
    "model.vision.pretrained": "{}",
    "model.llm.pretrained": "{}",
    "checkpoint.resume": "{}",
    "checkpoint.init_from": "{}",
}


@pytest.mark.parametrize("key", PATHS)
def test_every_path_of_a_run(key: str) -> None:
    value = load_config(DIGITS, [f"{key}={PATHS[key].format('~/$SCRATCH')}"])
    for part in key.split("."):
        value = getattr(value, part)
    assert str(value[0] if isinstance(value, list) else value) == "/homes/ada//scratch/ada" or (
        value == Path("/homes/ada/scratch/ada")
    )
    with pytest.raises(InputError, match=rf"{key}(\.0)?: .*NOWHERE, which is not set"):
        load_config(DIGITS, [f"{key}={PATHS[key].format('$NOWHERE')}"])


def test_paths_of_the_data_tools_and_of_a_mixture() -> None:
    mixture = ["data.shards=[]", "data.datasets.on.shards=[~/on]"]
    config = load_settings(DataConfig, DIGITS, mixture)
    assert config.data.datasets["on"].shards == ["/homes/ada/on"]


def test_the_config_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_bytes(Path(DIGITS).read_bytes())
    assert load_config("~/run.yaml") == load_config(DIGITS)
