"""python -m training.generate: answers, streaming, chat, --compare, --stats, bad input."""

import io
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from data_pipeline.errors import InputError
from tests.training.exported import COLOURS, make_folder
from training.generate import generate_answer, load_model
from training.generate.__main__ import main
from training.generate.answer import prepare_messages
from training.generate.conversation import Conversation, user_message


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("exported"), samples=1, steps=80)[0]


@pytest.fixture
def images(tmp_path: Path) -> dict[str, str]:
    """A file of each colour."""
    for name, colour in COLOURS.items():
        Image.new("RGB", (20, 20), colour).save(tmp_path / f"{name}.png")
    return {name: str(tmp_path / f"{name}.png") for name in COLOURS}


def test_answers_at_the_count_asked_for(model, images, capsys):
    for name, path in images.items():
        asked = [str(model), "--image", path, "--prompt", "What colour?"]
        lengths = []
        for count in ("4", "16"):
            main([*asked, "--num-image-tokens", count, "--stats"])
            captured = capsys.readouterr()
            assert captured.out.strip() == name
            found = re.search(r"(\d+) prompt tokens \((\d+) of images\), first token", captured.err)
            assert found and int(found[2]) == int(count)
            lengths.append(int(found[1]))
        assert lengths[1] - lengths[0] == 12
    assert "tokens/s" in captured.err


def test_several_images_go_where_the_prompt_says(model, images, capsys):
    loaded = load_model(str(model))
    message = user_message("a <image> b <image> c", [Path(images["red"]), Path(images["blue"])])
    assert [part["type"] for part in message["content"]] == [
        "text",
        "image",
        "text",
        "image",
        "text",
    ]
    inputs = prepare_messages(loaded, [message], 4)
    assert inputs["pixel_values"].shape[0] == 2
    red, blue = inputs["pixel_values"].float().mean((2, 3)).tolist()
    assert red == [255, 0, 0] and blue == [0, 0, 255]
    before = user_message("which?", [Path(images["red"]), Path(images["blue"])])
    assert [part["type"] for part in before["content"]] == ["image", "image", "text"]
    both = ["--image", images["red"], "--image", images["blue"], "--prompt", "What colour?"]
    main([str(model), *both, "--max-new-tokens", "3", "--stats"])
    assert "(8 of images)" in capsys.readouterr().err


def test_the_answer_is_what_generate_gives(model, images):
    loaded = load_model(str(model))
    inputs = prepare_messages(loaded, [user_message("What colour?", [images["blue"]])], 9)
    answer = generate_answer(loaded, inputs, 20)
    ids = loaded.model.generate(**inputs, max_new_tokens=20, do_sample=False)[0]
    ids = ids[inputs["input_ids"].shape[1] :].tolist()
    assert ids == [*answer.ids, ids[-1]] and answer.ended
    assert answer.generated == len(ids)
    assert 0 < answer.first_token_s < answer.total_s
    assert answer.tokens_per_s == pytest.approx(
        (len(ids) - 1) / (answer.total_s - answer.first_token_s)
    )
    cut = generate_answer(loaded, inputs, 1)
    assert not cut.ended and cut.ids == answer.ids[:1] and cut.tokens_per_s == 0


def test_the_folders_taste_does_not_change_greedy_answers(model, images):
    loaded = load_model(str(model))
    inputs = prepare_messages(loaded, [user_message("What colour?", [images["red"]])], 4)
    expected = generate_answer(loaded, inputs, 20).ids
    loaded.model.generation_config.do_sample = True
    loaded.model.generation_config.temperature = 5.0
    loaded.model.generation_config.repetition_penalty = 100.0
    for seed in range(3):
        torch.manual_seed(seed)
        assert generate_answer(loaded, inputs, 20).ids == expected


def test_compare_prints_a_row_per_count(model, images, capsys):
    asked = [str(model), "--image", images["blue"], "--prompt", "What colour?"]
    main([*asked, "--compare", "16", "4", "9"])
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["tokens/tile", "image"]
    assert [row.split()[:2] for row in rows] == [["4", "4"], ["9", "9"], ["16", "16"]]
    assert all(row.endswith("blue") and row.count(" ms") == 2 for row in rows)


class Streamed(io.StringIO):
    """Standard output that notes its pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []

    def write(self, text: str) -> int:
        self.pieces.append(text)
        return super().write(text)


def test_words_come_as_they_are_generated(images, tmp_path, monkeypatch, capsys):
    """A model that knows nothing rambles until it is cut off."""
    folder = make_folder(tmp_path / "untaught", samples=1, steps=0)[0]
    output = Streamed()
    monkeypatch.setattr(sys, "stdout", output)
    image = ["--image", images["red"], "--prompt", "What colour?"]
    main([str(folder), *image, "--max-new-tokens", "40"])
    loaded = load_model(str(folder))
    message = user_message("What colour?", [images["red"]])
    answer = generate_answer(loaded, prepare_messages(loaded, [message], 4), 40)
    assert output.getvalue().strip() == answer.text.strip()
    assert not answer.ended and len([piece for piece in output.pieces if piece.strip()]) > 2
    assert "(cut off after --max-new-tokens 40)" in capsys.readouterr().err


def test_chat_keeps_the_conversation(model, images, monkeypatch, capsys):
    lines = [
        f"/image {images['blue']}",
        "What colour?",
        "/tokens 16",
        "/tokens 5",
        "/sing",
        "/image nothing.png",
        "What colour?",
        "/reset",
        f"/image '{images['red']}'",
        "What colour?",
        "/quit",
        "never asked",
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    main([str(model), "--chat", "--num-image-tokens", "4", "--stats"])
    captured = capsys.readouterr()
    answers = captured.out.split()
    assert answers[0] == "blue" and answers[-1] == "red"
    images_tokens = re.findall(r"(\d+) prompt tokens \((\d+) of images\)", captured.err)
    # The first image stays in the conversation, at the count of now, and goes with /reset.
    assert [int(count) for _, count in images_tokens] == [4, 16, 16]
    assert int(images_tokens[1][0]) > int(images_tokens[2][0])
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 3
    assert "/tokens: num_image_tokens is 5" in errors[0]
    assert (
        "'/sing' is none of /image PATH" in errors[1] and "nothing.png is not a file" in errors[2]
    )


def test_a_question_that_fails_is_not_kept(model):
    loaded = load_model(str(model))
    talk = Conversation([Path(__file__)], 4)  # not an image
    with pytest.raises(InputError, match=rf"images\[0\] .*{Path(__file__).name}"):
        prepare_messages(loaded, talk.ask("What?"), 4)
    assert talk.messages == [] and talk.command("/reset", loaded)
    assert talk.pending == []


def test_bad_input_is_one_error(model, images, tmp_path):
    (tmp_path / "no.png").write_text("not an image")
    image = ["--image", images["red"]]
    wrong: dict[tuple[str, ...], str] = {
        (*image,): "give --prompt, or --chat",
        ("--image", "missing.png", "--prompt", "a"): "--image missing.png is not a file",
        ("--image", str(tmp_path / "no.png"), "--prompt", "a"): "cannot be used as an image",
        (*image, "--prompt", "a <image> <image>"): "2 <image> for 1 images",
        ("--prompt", "a <image>"): "1 <image> for 0 images",
        (*image, "--prompt", "a", "--num-image-tokens", "5"): "the tokens of a tile are a square",
        (*image, "--prompt", "a", "--compare", "4", "25"): "--compare: num_image_tokens is 25",
        (*image, "--prompt", "word " * 600): "the context holds|the language model's context is",
        (*image, "--chat", "--compare", "4"): "leave out --chat",
    }
    for arguments, message in wrong.items():
        with pytest.raises(InputError, match=message):
            main([str(model), *arguments])


def test_nothing_in_the_folder_is_executed(model, images, tmp_path, capsys):
    """Unless --trust-remote-code says so."""
    folder, witness = tmp_path / "model", tmp_path / "executed"
    shutil.copytree(model, folder)
    for path in folder.glob("*.py"):
        path.write_text(f"open({str(witness)!r}, 'w').write('yes')\n" + path.read_text())
    assert list(folder.glob("*.py"))
    main([str(folder), "--image", images["red"], "--prompt", "What colour?"])
    assert capsys.readouterr().out.strip() == "red" and not witness.exists()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "else"}))
    with pytest.raises(InputError, match=r"'else'.*'tokenflex'.*trust-remote-code"):
        main([str(folder), "--prompt", "What colour?"])
    assert not witness.exists()
    asked = ["--image", images["red"], "--prompt", "What colour?"]
    main([str(folder), "--trust-remote-code", *asked])
    assert capsys.readouterr().out.strip() == "red" and witness.exists()


def test_what_is_no_model_folder_is_refused(tmp_path: Path, model: Any):
    for name, message in {
        str(tmp_path): "has no config.json; give a folder that training.export wrote",
        str(tmp_path / "a" / "b"): "a/b does not exist.*training.export",
    }.items():
        with pytest.raises(InputError, match=message):
            main([name, "--prompt", "a"])
