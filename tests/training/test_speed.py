"""What is asked for to make a step faster: refused by name, or the same numbers as without."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import lookup_backend
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from data_pipeline.errors import InputError
from tests.environments.python import python_with
from tests.ranks import RankPool
from tests.training.scenarios import DIGITS
from tests.training.speed_scenarios import faster_gradients, worst
from tests.training.test_model import SAMPLES, gradients, make_batch, make_model
from training.config import LAYERED, RunConfig, load_config
from training.model.attention import ATTENTION_NAME, packed_attention
from training.parameters import recompute_activations
from training.speed import (
    check_settings,
    compiled_layers,
    flash_attention,
    liger_decoder,
    obstacles,
)
from training.speed.compiled_layers import compile_layers, compile_obstacle, layers_of
from training.speed.flash_attention import activate_fa3, fa3_obstacle
from training.speed.liger_decoder import KNOWN, liger_obstacle

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def config_of(*overrides: str) -> RunConfig:
    return load_config(DIGITS, list(overrides))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["train.decoder_impl=liger", "model.llm.config.model_type=granite"],
            ("granite", "qwen2"),
        ),
        (["train.decoder_impl=liger", "model.llm.config.hidden_act=gelu"], ("gelu", "silu")),
        (["train.decoder_impl=liger", "train.compile_layers=true"], ("[vision_model]",)),
        (["train.flash_attention=fa3", "train.precision=fp32"], ("fp32", "bf16")),
    ],
)
def test_what_no_machine_can_do_is_refused_by_name(overrides: list[str], said: tuple) -> None:
    with pytest.raises(InputError) as error:
        check_settings(config_of(*overrides))
    for text in (overrides[0], *said):
        assert text in str(error.value)
    check_settings(config_of())


def test_a_machine_without_a_gpu_is_told_what_to_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(liger_decoder.importlib.util, "find_spec", lambda name: None)
    assert "tests/environments/liger.txt" in str(liger_obstacle(GPU))
    assert Path("tests/environments/liger.txt").is_file()
    monkeypatch.setattr(liger_decoder.importlib.util, "find_spec", lambda name: SimpleNamespace())
    assert liger_obstacle(GPU) is None
    asked = config_of("train.decoder_impl=liger", "train.flash_attention=fa3")
    for setting, obstacle in obstacles(asked, CPU):
        other = {"train.decoder_impl": "transformers", "train.flash_attention": "torch"}
        name = setting.partition("=")[0]
        assert obstacle and "GPU" in obstacle and f"{name}={other[name]}" in obstacle
    assert not list(obstacles(config_of(), CPU))


def test_flash_attention_3_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "8.0" in str(fa3_obstacle(GPU))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert "flash_attn_interface is not installed" in str(fa3_obstacle(GPU))
    with pytest.raises(InputError, match=r"train\.flash_attention=fa3.*flash_attn_interface"):
        activate_fa3()  # PyTorch's own switch, without the package
    monkeypatch.setattr(flash_attention, "_switch", lambda: None)
    assert "2.11" in str(fa3_obstacle(GPU))


class Graphs:
    """A backend that counts what is compiled, and needs no compiler."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.count += 1
        return lookup_backend("aot_eager")(graph, inputs)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphs]:
    backend = Graphs()
    monkeypatch.setattr(compiled_layers, "BACKEND", backend)
    yield backend
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, packed_attention)
    torch.compiler.reset()


@pytest.mark.parametrize("again", [(), LAYERED], ids=["kept", "recomputed"])
def test_compiled_layers_give_the_same_for_all_packs(graphs: Graphs, again: Any) -> None:
    model = make_model(text={"num_hidden_layers": 3}).train()
    recompute_activations(model, again)
    batches = [make_batch(samples) for samples in (SAMPLES, SAMPLES[:2], SAMPLES[1:], SAMPLES)]

    def step(batch: dict[str, Any]) -> dict[str, Tensor]:
        model.zero_grad()
        model(**batch).loss.backward()
        return gradients(model)

    expected = [step(batch) for batch in batches]
    compile_layers(model, LAYERED)
    counts = []
    for batch, before in zip(batches, expected, strict=True):
        for name, found in step(batch).items():
            torch.testing.assert_close(found, before[name], rtol=1e-4, atol=1e-5, msg=name)
        counts.append(graphs.count)
    assert counts[0] >= 4 and counts[0] == counts[-1], counts


@pytest.mark.multiprocess
def test_compiled_layers_give_the_same_under_zero3(
    two_ranks: RankPool, digits_corpus: Path
) -> None:
    how = ["train.projector_impl=torch", "train.gradient_checkpointing=[language_model]"]
    plain, compiled = (
        two_ranks.run(faster_gradients, digits_corpus, [*how, *more])
        for more in ([], ["train.compile_layers=true"])
    )
    for (loss, expected), (other, found) in zip(plain, compiled, strict=True):
        assert other == pytest.approx(loss, rel=1e-6) and worst(expected, found) < 1e-5


def test_layers_that_cannot_be_found_are_named() -> None:
    model = make_model()
    model.vision_model = nn.Linear(2, 2)
    with pytest.raises(InputError, match=r"compile_layers: vision_model \(Linear\)"):
        list(layers_of(model, ["vision_model"]))
    layers = list(layers_of(model, ["language_model"]))
    assert [type(layer).__name__ for layer in layers] == ["Qwen2DecoderLayer"] * 2


def test_a_machine_without_a_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_layers.shutil, "which", lambda name: None)
    assert "g++" in str(compile_obstacle(CPU)) and "compile_layers=false" in str(
        compile_obstacle(CPU)
    )
    monkeypatch.setattr(compiled_layers.shutil, "which", lambda name: name)
    assert compile_obstacle(CPU) is None


@pytest.fixture(scope="module")
def liger(digits_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    python = python_with("liger_kernel", "liger")
    out = tmp_path_factory.mktemp("liger") / "results.json"
    command = [python, "-m", "tests.training.liger_scenarios", str(digits_corpus), str(out)]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.mark.multiprocess
def test_liger_computes_the_same_on_packs_and_under_zero3(liger: dict[str, Any]) -> None:
    for kind in KNOWN:
        found = liger[kind]
        assert found["error"] < 1e-4 and found["compared"] > 20, kind
        assert found["calls"]["rope"] >= 2 and found["calls"]["swiglu_forward"] == 2, kind
        assert found["calls"]["rms_norm_forward"] >= 5 and not found["waits"], kind
    assert liger["engine"] < 1e-5


@pytest.mark.multiprocess
def test_ligers_own_loss_is_not_taken_for_a_reason(liger: dict[str, Any]) -> None:
    """Where this fails, docs/performance.md is out of date and the choice open again."""
    assert "_local_scalar_dense" in liger["loss"]["waits"]
    assert liger["loss"]["empty"] == "ZeroDivisionError"
