"""Shards as img2dataset writes them: indexed and read in place."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.captions import PROMPT, caption_messages
from data_pipeline.chat import ChatSettings, tokenize_chat
from data_pipeline.index import build_index, load_index
from data_pipeline.index.columns import CAPTION_JSON, CAPTION_TEXT, CHAT
from data_pipeline.prepare.convert import Conversion
from data_pipeline.prepare.folder import prepare_folder
from data_pipeline.tokenizer import Tokenizer, load_tokenizer
from tests.data_pipeline.small_tokenizers import save_sentencepiece
from tests.data_pipeline.test_index import Sample, make_sample, picture, write_shard

SETTINGS = ChatSettings()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(save_sentencepiece(tmp_path_factory.mktemp("tokenizer")))


def metadata(caption: Any, **more: Any) -> bytes:
    """As img2dataset writes it, which is more than this."""
    entry = {"caption": caption, "url": "https://host/1.jpg", "width": 5, "status": "success"}
    return json.dumps(entry | more).encode()


def captioned(key: str, **members: bytes) -> Sample:
    return {"__key__": key, "jpg": picture(20, 30, "JPEG"), **members}


def test_captions_become_messages(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_shard(
        tmp_path / "00000.tar",
        [
            captioned("000000000", txt=b"A cat.\n", json=metadata("Another text.")),
            captioned("000000001", txt="\ufeffÜber a hill".encode()),
            captioned("000000002", json=metadata(" A dog. ", similarity=0.3)),
            {"__key__": "000000003", "PNG": picture(7, 8), "txt": b"Upper case."},
            {"__key__": "000000004", "webp": picture(9, 9, "WEBP"), "txt": b"A third."},
            {"__key__": "000000005", "jpeg": picture(4, 3, "JPEG"), "txt": b"A fourth."},
            make_sample("chat", {"0.png": picture(3, 4)}),
        ],
    )
    build_index(str(tmp_path), tokenizer, SETTINGS)
    index = load_index(str(tmp_path), tokenizer, SETTINGS)
    captions = ["A cat.", "Über a hill", "A dog.", "Upper case.", "A third.", "A fourth."]
    for i, caption in enumerate(captions):
        sample = index.read_sample(i)
        assert sample["messages"] == caption_messages("image", caption)
        chat = tokenize_chat(sample["messages"], tokenizer, SETTINGS)
        assert index.text_tokens[i] == len(chat.input_ids)
        assert index.supervised_tokens[i] == sum(chat.supervised)
        assert len(chat.image_positions) == len(index.read_images(i)) == 1
        assert caption in index.read_text(i).decode()
    assert index.image_sizes(3).tolist() == [[7, 8]]
    assert index.read_sample(2)["metadata"] == json.loads(metadata(" A dog. ", similarity=0.3))
    assert index.read_sample(0)["metadata"] == {}
    assert index.read_sample(6)["messages"][1]["content"][0]["text"] == "A cell."
    kinds = [CAPTION_TEXT, CAPTION_TEXT, CAPTION_JSON, *[CAPTION_TEXT] * 3, CHAT]
    assert index.join("kind").tolist() == kinds
    assert index.bad == [] and index.totals["unused_images"] == 0


def test_captions_that_cannot_be_used(tmp_path: Path, tokenizer: Tokenizer) -> None:
    two = captioned("two", txt=b"Which?")
    two["png"] = picture(3, 3)
    write_shard(
        tmp_path / "00000.tar",
        [
            captioned("good", txt=b"A cat."),
            captioned("blank", txt=b" \n"),
            captioned("zero", txt=b"", json=metadata(" ")),
            captioned("latin", txt="Über".encode("latin-1")),
            captioned("null", json=metadata(None)),
            captioned("none", json=b'{"url": "https://host"}'),
            captioned("number", json=metadata(3)),
            captioned("list", json=b"[]"),
            captioned("broken", json=b"{", txt=b""),
            captioned("alone"),
            {"__key__": "text", "txt": b"No image."},
            {"__key__": "captions", "json": metadata("No image.")},
            {"__key__": "picture", "jpg": b"no picture", "txt": b"A cat."},
            two,
        ],
    )
    build_index(str(tmp_path), tokenizer, SETTINGS)
    index = load_index(str(tmp_path), tokenizer, SETTINGS)
    assert index.keys.tolist() == ["good"]
    reasons = {
        "blank": "the caption is empty",
        "zero": "the caption is empty",
        "latin": "the caption is not UTF-8",
        "null": 'has no text as "caption"',
        "none": 'has no text as "caption"',
        "number": 'has no text as "caption"',
        "list": "not an object",
        "broken": "the caption is empty",
        "alone": "there is no member alone.json or alone.txt beside jpg",
        "text": "there is no member text.json beside txt",
        "captions": 'the JSON has no "messages"',
        "picture": "image 'jpg': not an image",
        "two": "one caption for several images: jpg, png",
    }
    found = {bad.key: bad.reason for bad in index.bad}
    assert found.keys() == reasons.keys()
    for key, reason in reasons.items():
        assert reason in found[key]


def test_the_prompt_is_that_of_prepare_folder(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """The same image and caption, through either way, are the same ids."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "one.png").write_bytes(picture(5, 5))
    (source / "one.txt").write_text("A picture.\n")
    prepare_folder(source, tmp_path / "out", conversion=Conversion())
    sample = {"__key__": "one", "png": picture(5, 5), "txt": b"A picture.\n"}
    write_shard(tmp_path / "img2dataset" / "00000.tar", [sample])
    samples = []
    for folder in (tmp_path / "out", tmp_path / "img2dataset"):
        build_index(str(folder), tokenizer, SETTINGS)
        messages = load_index(str(folder), tokenizer, SETTINGS).read_sample(0)["messages"]
        samples.append(tokenize_chat(messages, tokenizer, SETTINGS))
    assert samples[0] == samples[1]
    assert messages[0]["content"][1]["text"] == PROMPT == "Describe the image."
