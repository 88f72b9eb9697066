"""python -m training.demo: what it draws and refuses, and the page in a real browser."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoConfig

from data_pipeline.errors import InputError
from tests.chromium import require_chromium
from tests.devtools import Page
from tests.environments.python import python_with
from tests.training.exported import make_folder
from tests.training.tiny import make_processor
from training.demo import answers as module
from training.demo.__main__ import main
from training.demo.answers import Answers, checked_side, open_image
from training.demo.example_pictures import draw_examples, examples_in
from training.demo.token_grid import draw_token_grid
from training.generate import LoadedModel, generate_answer, load_model
from training.model.known_counts import note_counts


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_folder(tmp_path_factory.mktemp("exported"), samples=1, steps=80)[0]
    config = AutoConfig.from_pretrained(folder)
    rows = [
        {"detail": "all", "num_image_tokens": 4, "accuracy": 0.9, "answers": 50},
        {"detail": "all", "num_image_tokens": 9, "accuracy": 0.125, "answers": 50},
        {"detail": "k=1", "num_image_tokens": 16, "accuracy": 0.5, "answers": 25},
    ]
    note_counts(config, [4, 16], rows)
    config.save_pretrained(folder)
    return folder


@pytest.fixture
def loaded(model: Path) -> LoadedModel:
    return load_model(str(model))


def test_the_grid_has_the_tiles_and_the_tokens_of_the_model(tmp_path):
    processor = make_processor(tmp_path)  # up to 4 tiles
    black = Image.new("RGB", (200, 100))
    for side in (1, 3):
        shown, tiles = draw_token_grid(black, processor, side)
        counted = processor.image_processor(black)["num_tiles"][0]
        assert (shown.size, tiles) == ((720, 360), counted) and tiles == 3
        pixels = np.asarray(shown)
        cell = 720 // (2 * side)  # 2 tiles of `side` tokens beside each other
        lines = pixels[cell // 2].any(axis=1)
        edges = np.minimum(np.arange(2 * side + 1) * cell, 719)
        assert lines[edges].all() and not lines[edges[:-1] + cell // 2].any()
        assert (pixels[cell // 2, edges[::side]] == (255, 90, 0)).all()  # those of the tiles
    assert not np.asarray(black).any()  # a copy was drawn on
    assert draw_token_grid(black, processor, 2, max_tiles=1)[1] == 1


@pytest.fixture
def page_answers(loaded: LoadedModel) -> Answers:
    gradio = SimpleNamespace(Error=GradioError, update=lambda **changes: changes)
    return Answers(gradio, loaded, 20)


class GradioError(Exception):
    def __init__(self, message: str, print_exception: bool) -> None:
        super().__init__(message)


def test_what_is_known_of_a_count_is_what_is_recorded(page_answers, loaded):
    assert (
        page_answers.of(2) == "4 tokens per tile: trained; 90.0% of 50 held-out answers are right."
    )
    found = page_answers.of(3)
    assert "9 tokens per tile: not trained; 12.5% of 50" in found
    assert page_answers.of(4) == "16 tokens per tile: trained, not evaluated."
    assert "not trained, not evaluated: nothing is known" in page_answers.of(1)
    assert [n for n in range(1, 17) if page_answers.is_trained(n)] == [4, 16]
    del loaded.config.trained_num_image_tokens, loaded.config.evaluated_num_image_tokens
    unknown = Answers(page_answers._gradio, loaded, 20)
    assert "not recorded" in unknown.of(2) and not unknown.is_trained(4)


def test_every_shape_is_warmed_up_before_it_is_timed(page_answers, monkeypatch, tmp_path):
    made = []

    def generate(loaded: Any, inputs: Any, most: int) -> Any:
        made.append((inputs["pixel_values"].shape[0], int(inputs["tile_sides"][0]), most))
        return generate_answer(loaded, inputs, most)

    monkeypatch.setattr(module, "generate_answer", generate)
    Image.new("RGB", (40, 20), (255, 0, 0)).save(tmp_path / "red.png")
    file = str(tmp_path / "red.png")
    text, cost = page_answers.answer(file, "What colour?", 2, 1)
    assert text == {"value": "red", "label": "Answer at 4 tokens per tile"}
    assert "(4 of images)" in cost
    page_answers.answer(file, "What colour?", 2, 1)
    page_answers.answer(file, "What colour?", 2, 4)
    assert made == [(1, 2, 2), (1, 2, 20), (1, 2, 20), (3, 2, 2), (3, 2, 20)]
    made.clear()
    *_, rows = page_answers.compare(file, "What colour?", [16, 4], 1)
    assert made == [(1, 2, 20), (1, 4, 2), (1, 4, 20)]
    assert [row[:2] + row[-1:] for row in rows] == [["4", "4", "red"], ["16", "16", "red"]]


def test_errors_are_shown(page_answers, tmp_path):
    (tmp_path / "no.png").write_text("not an image")
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    file = str(tmp_path / "a.png")
    wrong = {
        (None, " ", 2, 1): "ask a question",
        (None, "a <image>", 2, 1): "leave <image> out",
        (str(tmp_path / "no.png"), "a", 2, 1): "no.png cannot be used",
        (file, "word " * 600, 2, 1): "the context holds 512",
        (file, "a", 5, 1): "n is 5",
        (file, "a", 2, 25): "max_tiles is 25; .* from 1 to 24",
        (file, "a", 2, 0.5): "max_tiles is 0.5",
    }
    for asked, message in wrong.items():
        with pytest.raises(GradioError, match=message):
            page_answers.answer(*asked)
    with pytest.raises(GradioError, match="choose the token counts"):
        next(page_answers.compare(file, "a", [], 1))
    with pytest.raises(GradioError, match="counts: num_image_tokens is 5"):
        next(page_answers.compare(file, "a", [4, 5], 1))


def test_examples_are_a_folders_or_drawn(tmp_path):
    for file, question in draw_examples(tmp_path):
        assert open_image(file).size[0] > 400 and question.endswith("?")
    (tmp_path / "words.txt").write_text("Which platform?\n")
    found = {Path(file).name: question for file, question in examples_in(tmp_path)}
    assert found.keys() == {"chart.png", "shapes.png", "words.png"}
    assert found["words.png"] == "Which platform?" and found["chart.png"].endswith("show?")
    (tmp_path / "bad.png").write_text("not an image")
    with pytest.raises(InputError, match=r"bad\.png"):
        examples_in(tmp_path)
    with pytest.raises(InputError, match="holds no pictures"):
        examples_in(tmp_path / "nothing")


def test_only_images_and_the_sliders_values_are_taken(loaded, tmp_path):
    (tmp_path / "no.png").write_text("not an image")
    (tmp_path / "page.svg").write_text("<svg/>")
    for name in ("no.png", "page.svg", "missing.png"):
        with pytest.raises(InputError, match=rf"{name}.*JPEG"):
            open_image(str(tmp_path / name))
    assert checked_side(loaded, 3.0) == 3
    for side in (0, 5, 2.5, float("nan"), float("inf"), -1):
        with pytest.raises(InputError, match=r"\b1 to 4\b"):
            checked_side(loaded, side)


def test_without_gradio_the_error_says_what_to_install(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(InputError, match="pip install gradio"):
        main([str(model)])


@pytest.fixture(scope="module")
def page(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """The page of a running demo, in a browser."""
    python = python_with("gradio", "demo")
    require_chromium()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-m", "training.demo", str(model), "--port", str(port)]
    offline = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, env=os.environ | offline)
    try:
        deadline = time.monotonic() + 180
        while True:
            assert process.poll() is None and time.monotonic() < deadline
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        # Nobody but this machine can connect.
        listening = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        addresses = {f[1] for f in listening if f[3] == "0A" and f[1].endswith(f":{port:04X}")}
        assert addresses == {f"0100007F:{port:04X}"}
        with Page(f"http://127.0.0.1:{port}/", tmp_path_factory.mktemp("browser")) as opened:
            opened.wait_for("!!document.querySelector('#file input[type=file]')")
            yield opened
    finally:
        process.terminate()
        process.wait(timeout=20)


def value(name: str) -> str:
    """What a text box holds, as JavaScript."""
    return f"document.querySelector('#{name} textarea, #{name} input')?.value"


def screenshot(page: Page, name: str) -> None:
    if folder := os.environ.get("DEMO_SCREENSHOTS"):
        page.screenshot(Path(folder) / f"{name}.png")


CLEAR = "document.querySelector('#file button[aria-label*=emove], #file button[title*=emove]')"


def test_the_page_shows_tokens_answers_and_latency(page: Page, tmp_path: Path):
    Image.new("RGB", (20, 20), (0, 0, 255)).save(tmp_path / "blue.png")
    (tmp_path / "no.png").write_text("not an image")
    shown = "document.body.innerText"
    page.wait_for(f"{shown}.includes('a slider over the vision tokens')")
    assert page.evaluate("document.title").startswith("model")
    page.wait_for(f"{value('known')}?.startsWith('4 tokens per tile: trained; 90.0%')")
    marked = "[...document.querySelectorAll('#marks span')].map(e => e.innerText.slice(2)).join()"
    page.wait_for(f"{marked} == '2 x 2,4 x 4'")
    page.set_file("#file input[type=file]", tmp_path / "blue.png")
    tokens, answer, latency = value("tokens"), value("answer"), value("latency")
    page.wait_for(f"{tokens} == '1 tile x 4 = 4 vision tokens'")
    page.wait_for("!!document.querySelector('#grid img')?.naturalWidth")
    page.type_into("#question textarea, #question input", "What colour?")
    page.evaluate("document.querySelector('#ask').click()")
    page.wait_for(f"{answer} == 'blue'")
    assert "(4 of images), first token after" in page.evaluate(latency)
    assert "Answer at 4 tokens per tile" in page.evaluate(shown)

    page.type_into("#side input[type=number]", "3")
    page.wait_for(f"{tokens} == '1 tile x 9 = 9 vision tokens'")
    page.wait_for(f"{answer} == '' && {latency} == ''")  # that of another count
    page.wait_for(f"{value('known')}.startsWith('9 tokens per tile: not trained; 12.5%')")
    page.evaluate("document.querySelector('#ask').click()")
    page.wait_for(f"{latency}.includes('(9 of images)')")

    page.evaluate("document.querySelector('#compare').click()")
    table = "document.querySelector('#comparison').innerText"
    page.wait_for(f"{table}.split('blue').length == 3")
    cells = page.evaluate(table).partition("says")[2].split()
    assert cells[:2] == ["4", "4"] and cells[len(cells) // 2 :][:2] == ["16", "16"]
    screenshot(page, "answer")

    page.evaluate(f"{CLEAR}.click()")
    page.wait_for(f"{answer} == '' && !!document.querySelector('#file input[type=file]')")
    page.set_file("#file input[type=file]", tmp_path / "no.png")
    page.wait_for(f"{shown}.includes('no.png cannot be used as an image')")
    page.evaluate(f"{CLEAR}.click()")
    page.wait_for("!!document.querySelector('#file input[type=file]')")


def test_an_image_is_pasted_and_an_example_taken(page: Page):
    page.allow_clipboard()
    page.evaluate(
        "(() => { const c = document.createElement('canvas'); c.width = 40; c.height = 20;"
        "c.toBlob(b => navigator.clipboard.write([new ClipboardItem({'image/png': b})])"
        ".then(() => document.title = 'copied', e => document.title = String(e))); })()"
    )
    page.wait_for("document.title == 'copied'")
    page.evaluate("document.querySelector('#file button[aria-label*=lipboard]').click()")
    page.wait_for(f"{value('tokens')}.startsWith('3 tiles x ')")
    page.evaluate("document.querySelector('#examples tbody tr, #examples button').click()")
    page.wait_for(f"{value('question')}.startsWith('How many shapes')")
    page.wait_for(f"!{value('tokens')}.startsWith('3 tiles x ')")
    screenshot(page, "example")
