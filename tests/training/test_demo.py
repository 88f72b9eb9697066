"""python -m training.demo: what it draws and refuses, and the page in a real browser."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.errors import InputError
from tests.chromium import require_chromium
from tests.devtools import Page
from tests.environments.python import python_with
from tests.training.exported import make_folder
from tests.training.tiny import make_processor
from training.demo.__main__ import main
from training.demo.gradio_page import checked_side, draw_token_grid, open_image
from training.generate import LoadedModel, load_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("exported"), samples=1, steps=80)[0]


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


@pytest.fixture
def page(model: Path, tmp_path: Path) -> Iterator[Page]:
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
        deadline = time.monotonic() + 90
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
        with Page(f"http://127.0.0.1:{port}/", tmp_path) as opened:
            yield opened
    finally:
        process.terminate()
        process.wait(timeout=20)


def test_the_page_shows_tokens_answers_and_latency(page: Page, tmp_path: Path):
    Image.new("RGB", (20, 20), (0, 0, 255)).save(tmp_path / "blue.png")
    (tmp_path / "no.png").write_text("not an image")
    page.wait_for("!!document.querySelector('#file input[type=file]')")
    page.set_file("#file input[type=file]", tmp_path / "blue.png")
    tokens = "document.querySelector('#tokens textarea, #tokens input')?.value"
    page.wait_for(f"{tokens} == '1 tile x 4 = 4 vision tokens'")
    page.wait_for("!!document.querySelector('#grid img')?.naturalWidth")
    page.type_into("#question textarea, #question input", "What colour?")
    page.evaluate("document.querySelector('#ask').click()")
    answer = "document.querySelector('#answer textarea, #answer input')?.value"
    page.wait_for(f"{answer} == 'blue'")
    latency = "document.querySelector('#latency textarea, #latency input')?.value"
    assert "(4 of images), first token after" in page.evaluate(latency)

    page.type_into("#side input[type=number]", "3")
    page.wait_for(f"{tokens} == '1 tile x 9 = 9 vision tokens'")
    page.evaluate("document.querySelector('#ask').click()")
    page.wait_for(f"{latency}.includes('(9 of images)')")
    if shot := os.environ.get("DEMO_SCREENSHOT"):
        page.screenshot(Path(shot))

    clear = "#file button[aria-label*=lear], #file button[title*=lear], #file .icon-button"
    page.evaluate(f"document.querySelector('{clear}')?.click()")
    page.wait_for("!!document.querySelector('#file input[type=file]')")
    page.set_file("#file input[type=file]", tmp_path / "no.png")
    page.wait_for("document.body.innerText.includes('no.png cannot be used as an image')")
