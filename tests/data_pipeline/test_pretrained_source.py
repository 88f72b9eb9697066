"""What looks like a local path and is not there is refused before a hub is asked."""

import socket
from pathlib import Path

import pytest
from huggingface_hub import constants

from data_pipeline.errors import InputError
from data_pipeline.pretrained_source import check_source, is_missing
from data_pipeline.tokenizer import load_tokenizer
from training.generate.loaded_model import load_model
from training.model import build


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with runs/a in it; who asks the network has failed."""
    (tmp_path / "runs" / "a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    def connect(*_: object) -> None:
        pytest.fail("asked the network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    return tmp_path


MISSING = [
    "/no/such/model",
    "./model",
    "../model",
    "~/no-such-model",
    "runs/b",
    "runs/a/b",
    "org/repo/model",
    "model/",
    "a model",
    "no/such.model",
    "tokenizer.json",
]


@pytest.mark.parametrize("source", MISSING)
def test_a_missing_path_is_an_error_at_once(source):
    with pytest.raises(InputError) as caught:
        check_source(source, f"data.x={source}", "a folder")
    assert f"data.x={source} does not exist" in str(caught.value)
    assert "give a folder" in str(caught.value)


@pytest.mark.parametrize("source", ["runs/a", "./runs/a", "Qwen/Qwen2.5-3B", "gpt2", Path("runs")])
def test_a_path_that_is_there_and_a_name_on_a_hub_pass(source):
    assert not is_missing(source)
    check_source(source, "data.x", "a folder")


def test_a_name_that_was_fetched_before_passes_whatever_folder_is_here(folder, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    (folder / "org").mkdir()
    assert is_missing("org/model")
    (folder / "hub" / "models--org--model").mkdir(parents=True)
    assert not is_missing("org/model")


@pytest.mark.parametrize(
    "load",
    [
        load_tokenizer,
        lambda source: load_model(source),
        lambda source: load_model(source, trust_remote_code=True),
        lambda source: build._check_folder("model.llm.pretrained", source),
    ],
    ids=["tokenizer", "model", "code of the folder", "backbone"],
)
@pytest.mark.parametrize("source", ["runs/b", "./runs/b"])
def test_all_that_load_refuse_it(load, source):
    with pytest.raises(InputError, match=rf"{source} does not exist .*runs.* give "):
        load(source)
