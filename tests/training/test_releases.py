"""An exported folder gives the same under every release of transformers that its card names."""

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import data_pipeline.processor
import training.model.hub as hub
from data_pipeline.processor import releases_tokenflex as releases
from tests.environments.python import python_in
from tests.training.tiny import make_model, make_processor, picture
from training.model import TokenFlexForConditionalGeneration
from training.model.hub import chatml_template

SCRIPT = Path(__file__).with_name("use_exported.py")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    processor = make_processor(folder / "tokenizer", chat_template=chatml_template(""))
    make_model(TokenFlexForConditionalGeneration, processor).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    picture(0).save(folder / "image.png")
    return folder


def use(exported: Path, python: str, name: str) -> dict[str, Any]:
    """What the script finds with a Python that has only the folder, not this repository."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTEST_CURRENT_TEST")}
    done = subprocess.run(
        [python, str(SCRIPT), "model", "image.png", f"{name}.pt"],
        cwd=exported,
        env={**kept, "HF_HOME": str(exported / name), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(exported / f"{name}.pt", weights_only=False)


@pytest.fixture(scope="module")
def expected(exported: Path) -> dict[str, Any]:
    found = use(exported, sys.executable, "this")
    assert len({tuple(answer) for answer in found["alone"]}) == 3  # or little would be tested
    same = ("batch of chats", "without a cache", "static cache", "in chunks", "one likely")
    for name in (*same, "saved again"):
        assert found[name] == found["alone"], name
    assert found["looked up"] == found["alone"][:1]
    assert found["assisted"] == found["alone"][1:2]
    assert found["kept dynamic"] == found["kept static"]
    assert found["pipeline batched"] == found["pipeline"]
    return found


@pytest.mark.parametrize("environment", ["oldest", "newest", "latest"])
def test_another_release_gives_the_same(exported, expected, environment):
    if environment == "latest" and os.environ.get("TRANSFORMERS_LATEST") != "1":
        pytest.skip("make latest")
    found = use(exported, python_in(f"transformers-{environment}", "extras"), environment)
    wanted = {"oldest": releases.OLDEST, "newest": releases.NEWEST}
    release = found.pop("release")
    assert release == wanted.get(environment, release)
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4, msg=name)
        elif name == "batch":
            assert found[name].keys() == value.keys()
            assert all(torch.equal(found[name][key], value[key]) for key in value)
        elif name != "release":
            assert found[name] == value, name


def test_a_release_outside_of_the_tested_ones_is_named_with_the_remedy(monkeypatch, caplog):
    for release in ("4.57.6", "5.3.9", "5.0.0.dev0"):
        with pytest.raises(ImportError, match=rf"{release}.*{releases.OLDEST}.*pip install"):
            releases.check_transformers(release)
    warned: list[str] = []
    logger = releases.logging.get_logger("transformers")
    monkeypatch.setattr(type(logger), "warning_once", lambda _, text: warned.append(text))
    for release in (releases.OLDEST, "5.23.1", f"{releases.NEWEST[:4]}.9", releases.__version__):
        releases.check_transformers(release)
    assert not warned
    releases.check_transformers("6.0.0")
    assert "6.0.0" in warned[0] and f"transformers=={releases.NEWEST}" in warned[0]


def test_each_file_that_is_loaded_first_names_all_that_it_needs():
    """Releases before 5.14 copy only the files that the first one itself imports."""

    def imported(path: Path) -> set[str]:
        nodes = ast.walk(ast.parse(path.read_text()))
        return {n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.level}

    def all_needed(path: Path) -> set[str]:
        needed, new = set(), imported(path)
        while new:
            needed |= new
            new = set().union(*(imported(path.with_name(f"{n}.py")) for n in new)) - needed
        return needed

    processor = Path(data_pipeline.processor.__file__).parent
    model = Path(hub.__file__).parent
    for path in (
        processor / "processing_tokenflex.py",
        processor / "image_processing_tokenflex.py",
        model / "configuration_tokenflex.py",
        model / "modeling_tokenflex.py",
    ):
        assert imported(path) == all_needed(path), path.name
        assert "releases_tokenflex" in imported(path)
