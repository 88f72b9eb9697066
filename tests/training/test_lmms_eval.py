"""The lmms-eval adapter: what it answers, and a local task through the real package."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from data_pipeline.errors import InputError
from tests.environments.python import python_with
from tests.training.exported import COLOURS, make_folder
from training.generate import LoadedModel
from training.generate.answer import prepare_messages
from training.generate.template import template_settings
from training.lmms_eval_adapter import adapter as module
from training.lmms_eval_adapter.__main__ import main
from training.lmms_eval_adapter.adapter import TokenFlexLmmsEval, as_messages, cut_at
from training.lmms_eval_adapter.models.tokenflex import TokenFlexPlugin
from training.lmms_eval_adapter.released_settings import (
    MAX_TILES,
    NUM_IMAGE_TOKENS,
    released_max_tiles,
    released_num_image_tokens,
)

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
    return doc["question"]

def to_results(doc, results):
    return {"right": float(results[0].strip() == doc["answer"])}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("exported"), samples=1, steps=80)[0]


def request(number: int, task: str = "colours", text: str = "", **generation: Any) -> Any:
    """As lmms-eval makes them for chat models."""

    def doc_to_messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
        asked = {"type": "text", "text": text or "What colour?"}
        image = doc["image"]
        content = [{"type": "image", "url": image() if callable(image) else image}, asked]
        return [{"role": "user", "content": content}]

    settings = {"max_new_tokens": 12, **generation}
    return SimpleNamespace(args=("", doc_to_messages, settings, number, task, "test"))


def colours() -> list[dict[str, Any]]:
    return [{"image": Image.new("RGB", (20, 20), COLOURS[name])} for name in COLOURS]


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


def missing() -> Image.Image:
    return Image.open("missing.png")


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_question_that_cannot_be_asked_gets_an_empty_answer(model, batch_size, capsys):
    adapter = TokenFlexLmmsEval(str(model), None, batch_size, "cpu", max_failed_fraction="0.5")
    adapter.task_dict = {"colours": {"test": [*colours(), {"image": missing}]}}
    requests = [request(2), request(0, text="word " * 600), request(4), request(1), request(3)]
    assert adapter.generate_until(requests) == ["blue", "", "", "green", "white"]
    named = [line for line in capsys.readouterr().err.splitlines() if line.startswith("no answer")]
    assert len(named) == 2
    assert "document 0 of colours (test)" in named[0] and "512" in named[0]
    assert "document 4 of colours (test)" in named[1] and "missing.png" in named[1]
    adapter._failed.report()
    assert "2 of 5 questions" in capsys.readouterr().err


def test_too_many_of_them_are_an_error(model):
    adapter = TokenFlexLmmsEval(str(model), None, 2, "cpu")  # a tenth by default
    adapter.task_dict = {"colours": {"test": colours()}}
    long = request(1, text="word " * 600)
    assert adapter.generate_until([long, *[request(0)] * 9])[:2] == ["", "red"]
    with pytest.raises(InputError, match=r"2 of 14.*max_failed_fraction=0\.1.*document 1 of col"):
        adapter.generate_until([long, *[request(0)] * 3])
    strict = TokenFlexLmmsEval(str(model), None, 2, "cpu", max_failed_fraction=0)
    strict.task_dict = adapter.task_dict
    with pytest.raises(InputError, match="1 of 10"):
        strict.generate_until([*[request(0)] * 9, long])


def test_an_answer_ends_where_the_context_does(model, monkeypatch):
    adapter = TokenFlexLmmsEval(str(model), None, 2, "cpu")
    adapter.task_dict = {"colours": {"test": colours()}}
    requests = [request(0), request(3), request(3, text="What colour?" + " " * 5)]
    answers = adapter.generate_until(requests)
    lengths = [
        prepare_messages(adapter._loaded, [as_messages(adapter._messages(r))], 4)["input_ids"].shape
        for r in requests
    ]
    prompt, longer = lengths[0][1], lengths[2][1]
    assert longer > prompt
    for room in range(1, 4):
        context = property(lambda loaded, room=room: longer + room - 1)
        monkeypatch.setattr(LoadedModel, "context", context)
        *found, cut = adapter.generate_until(requests)
        # A letter or less is a token; a longer prompt in the batch takes nothing from the others.
        assert found == [answer[: longer - prompt + room] for answer in answers[:2]]
        assert answers[2].startswith(cut) and len(cut) <= room


def test_tiles_and_tokens_are_set_for_all_tasks_or_by_the_task(model, monkeypatch):
    asked = []

    def prepare(loaded: Any, messages: Any, count: int, tiles: int | None = None) -> Any:
        asked.append((len(messages), count, tiles))
        return prepare_messages(loaded, messages, min(count, 16), tiles)

    monkeypatch.setattr(module, "prepare_messages", prepare)
    requests = [request(0), request(1), request(2, "mmvet"), request(3, "docvqa_val_lite")]
    tasks = {"colours": {"test": colours()}}
    tasks |= {"mmvet": tasks["colours"], "docvqa_val_lite": tasks["colours"]}
    for settings, expected in (
        ({"max_tiles": "3"}, [(2, 4, 3), (2, 4, 3)]),
        ({}, [(2, 4, None), (2, 4, None)]),
        ({"max_tiles": "released"}, [(2, 4, 6), (1, 4, 6), (1, 4, 18)]),  # two, mmvet, docvqa
    ):
        adapter = TokenFlexLmmsEval(str(model), None, 2, "cpu", **settings)
        adapter.task_dict = tasks
        asked.clear()
        assert adapter.generate_until(requests) == list(COLOURS)
        assert asked == expected
    with pytest.raises(InputError, match="num_image_tokens: num_image_tokens is 256"):
        TokenFlexLmmsEval(str(model), "released", device="cpu")
    monkeypatch.setattr(LoadedModel, "check_counts", lambda *arguments: None)
    adapter = TokenFlexLmmsEval(str(model), "released", 4, "cpu")
    adapter.task_dict = tasks
    asked.clear()
    adapter.generate_until(requests)
    assert asked == [(2, 256, None), (1, 144, None), (1, 256, None)]


@pytest.mark.parametrize(
    ("task", "tiles", "tokens"),
    [
        # In VLMEvalKit: ChartQA_TEST, ChartQAPro, MMMU_DEV_VAL, MMMU_Pro, MME-RealWorld-CN, ...
        ("chartqa", 12, 256),
        ("chartqapro", 6, 256),
        ("mmmu_val", 12, 256),
        ("mmmu_pro_standard", 6, 256),
        ("mmerealworld_cn", 12, 256),
        ("vcr_wiki_zh_hard_500", 12, 256),
        ("docvqa_val", 18, 256),
        ("infovqa_test", 24, 256),
        ("ocrbench", 24, 256),
        ("ocrbench_v2", 24, 256),
        ("hrbench8k", 24, 256),
        ("mmvet", 6, 144),
        ("mmvetv2", 6, 256),
        ("mathvista_testmini_format", 6, 144),
        ("hallusion_bench_image", 6, 576),
        ("mmstar", 6, 256),
        ("ai2d", 6, 256),
    ],
)
def test_the_released_settings_of_a_task(task, tiles, tokens):
    assert released_max_tiles(task) == tiles
    assert released_num_image_tokens(task) == tokens


def test_the_released_settings_are_those_of_the_docs():
    page = (ROOT / "docs" / "model.md").read_text()
    tables = {"max_tiles": MAX_TILES, "num_image_tokens": NUM_IMAGE_TOKENS}
    for name, table in tables.items():
        for value in set(table.values()):
            tasks = ", ".join(f"`{task}`" for task, own in table.items() if own == value)
            assert f"| `{name}` | {value} | {tasks} |" in page
        other = {"max_tiles": released_max_tiles, "num_image_tokens": released_num_image_tokens}
        assert f"| `{name}` | {other[name]('another')} | all others |" in page


def test_the_released_settings_name_tasks_that_there_are(lmms_python):
    code = (
        "import lmms_eval.tasks as t, pathlib; print(*[line for p in "
        "pathlib.Path(t.__path__[0]).rglob('*.yaml') for line in p.read_text().splitlines() "
        "if line.lstrip('- ').startswith('task:')], sep='\\n')"
    )
    shown = outside_network(lmms_python, "-c", code, variables={}, folder=ROOT)
    tasks = {line.partition("task:")[2].split("#")[0].strip(" \"'") for line in shown.splitlines()}
    for name in (*MAX_TILES, *NUM_IMAGE_TOKENS):
        assert any(f"{task}_".startswith(f"{name}_") for task in tasks), name


def test_stop_strings():
    assert cut_at("a; b\n\nc", [";"]) == "a" and cut_at("a; b\n\nc", "b") == "a; "
    assert cut_at("a\n\nb", ["\n\n"]) == cut_at("a\n\nb", None) == "a\n\nb"


def test_bad_input(model):
    with pytest.raises(InputError, match="num_image_tokens is 5"):
        TokenFlexLmmsEval(str(model), 5, device="cpu")
    with pytest.raises(InputError, match="a task has a video"):
        as_messages([{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}])
    for settings, message in {
        ("max_tiles", "many"): "max_tiles is 'many'.*whole number.*released",
        ("max_tiles", 0): "max_tiles is 0",
        ("max_tile", 3): "no setting max_tile;.* max_tiles,",
        ("max_new_tokens", "1.5"): r"max_new_tokens is '1\.5'",
        ("max_failed_fraction", 2): "max_failed_fraction is 2; .*from 0 to 1",
        ("dtype", "half"): "dtype is 'half'.*float16",
    }.items():
        with pytest.raises(InputError, match=message):
            TokenFlexLmmsEval(str(model), device="cpu", **dict([settings]))
    adapter = TokenFlexLmmsEval(str(model), device="cpu")
    with pytest.raises(NotImplementedError, match="no loglikelihood"):
        adapter.loglikelihood([])


def test_the_system_turn_is_a_text_or_a_files(model, tmp_path):
    (tmp_path / "system.txt").write_text("Be brief, please.\n")
    for system, expected in {
        "Be brief.": "Be brief.",
        str(tmp_path / "system.txt"): "Be brief, please.",
        "long " * 2000: "long " * 2000,
    }.items():
        adapter = TokenFlexLmmsEval(str(model), device="cpu", system=system)
        assert template_settings(adapter._loaded.processor).system == expected


def test_without_lmms_eval_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    with pytest.raises(InputError, match="pip install lmms-eval"):
        main()


@pytest.fixture(scope="module")
def lmms_python() -> str:
    """A Python that has lmms-eval, and Hugging Face's `kernels`."""
    return python_with("lmms_eval", "lmms")


def colours_task(folder: Path) -> Path:
    """A task of lmms-eval: the colours, with one reference that the model does not give."""
    task = folder / "task"
    task.mkdir()
    wrong = {"red": "green"}
    with (task / "colours.jsonl").open("w") as file:
        for name, colour in COLOURS.items():
            path = task / f"{name}.png"
            Image.new("RGB", (20, 20), colour).save(path)
            doc = {"file": str(path), "answer": wrong.get(name, name), "question": "What colour?"}
            file.write(json.dumps(doc) + "\n")
    (task / "colours.yaml").write_text(TASK.format(folder=task))
    (task / "colours.py").write_text(FUNCTIONS)
    return task


def evaluated(python: str, by_plugin: bool, task: Path, settings: str, code: int = 0) -> Any:
    """(results of the colours or None, standard error) of a run of lmms-eval."""
    plugin = {"LMMS_EVAL_PLUGINS": "training.lmms_eval_adapter"} if by_plugin else {}
    log = outside_network(
        *(python, "-m", "lmms_eval" if by_plugin else "training.lmms_eval_adapter"),
        *("--model", "tokenflex", "--batch_size", "2", "--model_args", settings),
        *("--tasks", "colours", "--include_path", str(task), "--device", "cpu"),
        *("--output_path", str(task / "out"), "--verbosity", "ERROR"),
        variables={"PYTHONPATH": str(ROOT)} | plugin,
        folder=task,
        code=code,
        errors=True,
    )
    found = list((task / "out").rglob("*_results.json"))
    return json.loads(found[0].read_text())["results"]["colours"] if found else None, log


@pytest.mark.parametrize("by_plugin", [False, True], ids=["module", "plugin"])
def test_a_local_task_through_lmms_eval(lmms_python, model, tmp_path, by_plugin):
    task = colours_task(tmp_path)
    settings = f"pretrained={model},num_image_tokens=16,max_tiles=2"
    results, _ = evaluated(lmms_python, by_plugin, task, settings)
    assert results["right,none"] == 0.75


def with_a_long_question(folder: Path) -> Path:
    task = colours_task(folder)
    docs = task / "colours.jsonl"
    lines = docs.read_text().splitlines()
    lines[2] = lines[2].replace("What colour?", "word " * 600)
    docs.write_text("\n".join(lines) + "\n")
    return task


def test_a_question_that_is_too_long_does_not_end_lmms_eval(lmms_python, model, tmp_path):
    settings = f"pretrained={model},max_failed_fraction=0.3"
    results, log = evaluated(lmms_python, False, with_a_long_question(tmp_path), settings)
    assert results["right,none"] == 0.5  # the others have their answers
    assert "document 2 of colours (test)" in log and "1 of 4 questions" in log


def test_too_many_of_them_give_an_exit_code(lmms_python, model, tmp_path):
    settings = f"pretrained={model},max_failed_fraction=0.2"
    results, log = evaluated(lmms_python, True, with_a_long_question(tmp_path), settings, 1)
    assert results is None and "error: 1 of 4 questions" in log


@pytest.mark.parametrize(
    ("failure", "raised", "message"),
    [
        (InputError("no folder"), InputError, "no folder"),
        (KeyError("reply"), SystemExit, "^1$"),
        (None, InputError, "there are no --tasks"),
    ],
)
def test_what_ends_lmms_eval_gives_an_exit_code(monkeypatch, capsys, failure, raised, message):
    """lmms-eval's command line says what failed, and returns."""

    def single(options: Any) -> Any:
        raise failure

    def command_line() -> None:
        try:
            fake.cli_evaluate_single(SimpleNamespace(tasks="colours" if failure else None))
        except Exception as error:
            print(error)

    fake = ModuleType("lmms_eval.__main__")
    fake.cli_evaluate_single, fake.cli_evaluate = single, command_line  # type: ignore[attr-defined]
    package, models = ModuleType("lmms_eval"), ModuleType("lmms_eval.models")
    package.__main__ = fake  # type: ignore[attr-defined]
    models.MODEL_REGISTRY_V2 = SimpleNamespace(register_manifest=lambda *a, **k: None)  # type: ignore[attr-defined]
    for name, each in {"lmms_eval": package, "lmms_eval.models": models}.items():
        monkeypatch.setitem(sys.modules, name, each)
    monkeypatch.setattr("training.lmms_eval_adapter.__main__.manifest", lambda: None)
    with pytest.raises(raised, match=message):
        main()
    if raised is SystemExit:
        assert "error: the evaluation failed: KeyError('reply')" in capsys.readouterr().err


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


def outside_network(
    *command: str, variables: dict[str, str], folder: Path, code: int = 0, errors: bool = False
) -> str:
    """Output of a command in a folder, or its errors, without a network."""
    home = str(folder / "hf") if folder != ROOT else "/nonexistent"
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": home, "WANDB_MODE": "disabled"}
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | offline | variables
    done = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == code, done.stderr[-3000:]
    return done.stderr if errors else done.stdout
