"""TRL's trainers and PEFT's adapters on an exported model, in the environment that has them."""

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.environments.python import python_with
from tests.training.exported import COLOURS, make_folder
from training.model import TokenFlexProcessor

SCENARIOS = Path(__file__).with_name("trl_scenarios.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("exported"), samples=1, steps=30)[0]


@pytest.fixture(scope="module")
def results(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the scenarios give where this repository is not."""
    python, out = python_with("trl", "trl"), tmp_path_factory.mktemp("trl")
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTEST_CURRENT_TEST")}
    done = subprocess.run(
        [python, str(SCENARIOS), str(folder), str(out)],
        cwd=out,
        env={**kept, "HF_HOME": str(out / "cache"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((out / "results.json").read_text())
    return found


@pytest.fixture(scope="module")
def own(folder: Path) -> dict[str, tuple[list[int], list[int]]]:
    """Each colour's conversation and its answer, as the processor itself gives their ids."""
    processor: Any = TokenFlexProcessor.from_pretrained(folder)
    found = {}
    for name, colour in COLOURS.items():
        image = {"type": "image", "image": Image.new("RGB", (20, 20), colour)}
        question = [image, {"type": "text", "text": "What colour?"}]
        encoded = processor.apply_chat_template(
            [{"role": "user", "content": question}, {"role": "assistant", "content": name}],
            tokenize=True,
            return_dict=True,
            return_tensors=None,
            return_assistant_tokens_mask=True,
        )
        (ids,), (mask,) = encoded["input_ids"], encoded["assistant_masks"]
        found[name] = ids, [token for token, is_own in zip(ids, mask, strict=True) if is_own]
    return found


def test_the_labels_of_sft_are_the_processors_own(results: Any, own: Any, folder: Path) -> None:
    newline = TokenFlexProcessor.from_pretrained(folder)(text="\n", return_tensors=None)
    (behind,) = newline["input_ids"]
    assert sorted(results["sft"]["ids"]) == sorted(ids for ids, _ in own.values())
    assert sorted(results["sft"]["labels"]) == sorted(answer + behind for _, answer in own.values())


def test_the_labels_of_dpo_are_the_answers(results: Any, own: Any, folder: Path) -> None:
    labels, count = results["dpo"]["labels"], len(own)
    newline = TokenFlexProcessor.from_pretrained(folder)(text="\n", return_tensors=None)
    (behind,) = newline["input_ids"]
    assert sorted(labels[:count]) == sorted(answer + behind for _, answer in own.values())
    assert len(labels) == 2 * count and all(row == labels[-1] for row in labels[count:])


@pytest.mark.parametrize("trainer", ["sft", "lora", "dpo", "grpo"])
def test_two_steps_train(results: Any, trainer: str) -> None:
    found = results[trainer]
    assert len(found["losses"]) == 2 and all(map(math.isfinite, found["losses"]))
    assert found["moved"]
    if trainer == "lora":
        for part in ("vision_model", "projector", "language_model"):
            assert any(f".{part}." in name for name in found["moved"])


def test_the_loss_of_sft_is_the_models_own(results: Any) -> None:
    assert results["sft"]["losses"][0] == pytest.approx(results["sft"]["own loss"], rel=1e-3)


def test_the_first_loss_of_dpo_is_that_of_equal_models(results: Any) -> None:
    assert results["dpo"]["losses"][0] == pytest.approx(math.log(2), abs=1e-3)


def test_an_adapter_is_saved_loaded_and_merged(results: Any) -> None:
    assert results["lora"]["reloaded"] and results["lora"]["merged"] < 1e-3


def test_an_adapter_of_an_earlier_folder_loads(results: Any) -> None:
    assert results["lora"]["earlier"]


def test_prompt_tuning_trains_its_tokens_alone(results: Any) -> None:
    (name,) = results["prompt_tuning"]["trained"]
    assert name.startswith("prompt_encoder") and results["prompt_tuning"]["new"] > 0
