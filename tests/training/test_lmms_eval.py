"""The lmms-eval adapter: what it answers, and a local task through the real package."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from data_pipeline.errors import InputError
from tests.environments.python import python_with
from tests.training.exported import COLOURS, make_folder
from training.lmms_eval_adapter.__main__ import main
from training.lmms_eval_adapter.adapter import TokenFlexLmmsEval, as_messages, cut_at
from training.lmms_eval_adapter.models.tokenflex import TokenFlexPlugin

ROOT = Path(__file__).parents[2]

TASK = """\
task: colours
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/colours.jsonl
test_split: test
output_type: generate_until
doc_to_visual: !function colours.to_visual
doc_to_text: !function colours.to_text
doc_to_target: answer
process_results: !function colours.to_results
generation_kwargs:
  max_new_tokens: 12
metric_list:
  - metric: right
    aggregation: mean
    higher_is_better: true
"""
FUNCTIONS = """\
from PIL import Image

def to_visual(doc):
    return [Image.open(doc["file"]).convert("RGB")]

def to_text(doc, lmms_eval_specific_kwargs=None):
    return "What colour?"

def to_results(doc, results):
    return {"right": float(results[0].strip() == doc["answer"])}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("exported"), samples=1, steps=80)[0]


def request(number: int, **generation: Any) -> Any:
    """As lmms-eval makes them for chat models."""

    def doc_to_messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
        content = [{"type": "image", "url": doc["image"]}, {"type": "text", "text": "What colour?"}]
        return [{"role": "user", "content": content}]

    settings = {"max_new_tokens": 12, **generation}
    return SimpleNamespace(args=("", doc_to_messages, settings, number, "colours", "test"))


def test_answers_in_order_whatever_the_batch(model):
    docs = [{"image": Image.new("RGB", (20, 20), COLOURS[name])} for name in COLOURS]
    for batch_size, count in ((1, None), ("3", "16")):
        adapter = TokenFlexLmmsEval(str(model), count, batch_size, device="cpu")
        adapter.task_dict = {"colours": {"test": docs}}
        assert adapter.num_image_tokens == int(count or 4)
        requests = [request(i) for i in (2, 0, 1, 3)]
        requests.insert(2, request(0, until=["e"]))
        assert adapter.generate_until(requests) == ["blue", "red", "r", "green", "white"]
        assert (adapter.rank, adapter.world_size, adapter.is_simple) == (0, 1, False)


def test_a_plugin_is_given_images_and_text(model):
    adapter = TokenFlexPlugin(str(model), 16, device="cpu")
    docs = [{"image": Image.new("RGB", (20, 20), COLOURS[name])} for name in COLOURS]
    adapter.task_dict = {"colours": {"test": docs}}

    def request(number: int, visual: Any = None) -> Any:
        def to_visual(doc: dict[str, Any]) -> list[Any]:
            return [visual or doc["image"]]

        settings = {"max_new_tokens": 12}
        args = ("What colour?", settings, to_visual, number, "colours", "test")
        return SimpleNamespace(args=args)

    assert adapter.generate_until([request(2), request(0)]) == ["blue", "red"]
    with pytest.raises(InputError, match="a task has a str"):
        adapter.generate_until([request(0, "a.mp4")])


def test_stop_strings():
    assert cut_at("a; b\n\nc", [";"]) == "a" and cut_at("a; b\n\nc", "b") == "a; "
    assert cut_at("a\n\nb", ["\n\n"]) == cut_at("a\n\nb", None) == "a\n\nb"


def test_bad_input(model):
    with pytest.raises(InputError, match="num_image_tokens is 5"):
        TokenFlexLmmsEval(str(model), 5, device="cpu")
    with pytest.raises(InputError, match="a task has a video"):
        as_messages([{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}])
    adapter = TokenFlexLmmsEval(str(model), device="cpu")
    with pytest.raises(NotImplementedError, match="no loglikelihood"):
        adapter.loglikelihood([])


def test_without_lmms_eval_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    with pytest.raises(InputError, match="pip install lmms-eval"):
        main()


@pytest.fixture(scope="module")
def lmms_python() -> str:
    """A Python that has lmms-eval, and Hugging Face's `kernels`."""
    return python_with("lmms_eval", "lmms")


@pytest.mark.parametrize("by_plugin", [False, True], ids=["module", "plugin"])
def test_a_local_task_through_lmms_eval(lmms_python, model, tmp_path, by_plugin):
    task = tmp_path / "task"
    task.mkdir()
    wrong = {"red": "green"}  # one reference that the model does not give
    with (task / "colours.jsonl").open("w") as file:
        for name, colour in COLOURS.items():
            path = task / f"{name}.png"
            Image.new("RGB", (20, 20), colour).save(path)
            doc = {"file": str(path), "answer": wrong.get(name, name)}
            file.write(json.dumps(doc) + "\n")
    (task / "colours.yaml").write_text(TASK.format(folder=task))
    (task / "colours.py").write_text(FUNCTIONS)
    plugin = {"LMMS_EVAL_PLUGINS": "training.lmms_eval_adapter"} if by_plugin else {}
    outside_network(
        *(lmms_python, "-m", "lmms_eval" if by_plugin else "training.lmms_eval_adapter"),
        *("--model", "tokenflex", "--batch_size", "2"),
        *("--model_args", f"pretrained={model},num_image_tokens=16"),
        *("--tasks", "colours", "--include_path", str(task), "--device", "cpu"),
        *("--output_path", str(tmp_path / "out"), "--verbosity", "ERROR"),
        variables={"PYTHONPATH": str(ROOT)} | plugin,
        folder=tmp_path,
    )
    (found,) = (tmp_path / "out").rglob("*_results.json")
    results = json.loads(found.read_text())["results"]["colours"]
    assert results["right,none"] == 0.75


def test_beside_the_kernels_of_hugging_face(lmms_python, tmp_path):
    code = (
        "import kernels, training.model.build, transformers.integrations.hub_kernels as hub;"
        "from transformers.utils.import_utils import is_kernels_available;"
        "print(kernels.__file__, is_kernels_available())"
    )
    shown = outside_network(lmms_python, "-c", code, variables={}, folder=ROOT)
    assert shown.split() == [str(ROOT / "kernels" / "__init__.py"), "False"]
    code = "import kernels, transformers.modeling_utils; print(kernels.get_kernel.__module__)"
    shown = outside_network(lmms_python, "-c", code, variables={}, folder=tmp_path)
    assert shown.startswith("kernels.")


def outside_network(*command: str, variables: dict[str, str], folder: Path) -> str:
    """Output of a command in a folder, without a network."""
    home = str(folder / "hf") if folder != ROOT else "/nonexistent"
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": home, "WANDB_MODE": "disabled"}
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | offline | variables
    done = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
