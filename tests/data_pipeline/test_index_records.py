"""Shards whose JSON is that of other trainers are read in place, and nothing in them is lost."""

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from data_pipeline.chat import ChatSettings
from data_pipeline.errors import InputError
from data_pipeline.index import Index, build_index, load_index
from data_pipeline.index.index_shard import index_shard
from data_pipeline.index.tar import ShardFault
from data_pipeline.storage import ReadAhead, Shard, Storage
from data_pipeline.storage.expand import passed_over
from data_pipeline.tokenizer import Tokenizer, load_tokenizer
from tests.data_pipeline.small_tokenizers import save_sentencepiece

CHAT = ChatSettings(system="")


def picture(width: int = 5, height: int = 4, format: str = "PNG") -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, format)
    return buffer.getvalue()


def noise(format: str) -> bytes:
    """A picture most of whose file is pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (80, 90, 3), dtype=np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(save_sentencepiece(tmp_path_factory.mktemp("tokenizer")))


def said(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": v} for i, v in enumerate(values)]


def index_of(
    folder: Path, tokenizer: Tokenizer, samples: dict[str, dict[str, Any]], **options: Any
) -> Index:
    with webdataset.TarWriter(str(folder / "0.tar"), encoder=False) as writer:
        for key, members in samples.items():
            content = {
                name: json.dumps(value).encode() if isinstance(value, dict) else value
                for name, value in members.items()
            }
            writer.write({"__key__": key, **content})
    build_index(str(folder), tokenizer, CHAT, **options)
    return load_index(str(folder), tokenizer, CHAT)


RECORDS: dict[str, dict[str, Any]] = {
    "llava": {"jpg": picture(7, 4), "json": {"conversations": said("<image>What?", "Red.")}},
    "named": {
        "jpg": picture(7, 4),
        "json": {"image": "some/where/7.jpg", "conversations": said("What?", "Red.")},
    },
    "member": {
        "0.png": picture(3, 4),
        "1.PNG": picture(7, 4),
        "json": {"images": ["1.png"], "conversations": said("What?", "Red.")},
    },
    "vqa": {"gif": picture(7, 4, "GIF"), "json": {"question": "What?", "answer": "Red.", "id": 3}},
    "cased": {"jpg": picture(7, 4), "json": {"Question": "What?", "Answer": "Red."}},
    "prompted": {"jpg": picture(7, 4), "json": {"prompt": "What?", "response": "Red."}},
    "strings": {
        "JPG": picture(7, 4),
        "JSON": {
            "messages": [
                {"role": "user", "content": "<image>What?"},
                {"role": "assistant", "content": "Red."},
            ],
            "source": "ours",
        },
    },
    "typed": {
        "0.bmp": picture(7, 4, "BMP"),
        "json": {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": "0.bmp"}, "What?"]},
                {"role": "assistant", "content": "Red."},
            ]
        },
    },
}


def test_records_in_place(tmp_path: Path, tokenizer: Tokenizer) -> None:
    index = index_of(tmp_path, tokenizer, RECORDS)
    assert index.bad == [] and index.keys.tolist() == list(RECORDS)
    for number, members in enumerate(RECORDS.values()):
        sample = index.read_sample(number)
        user, assistant = sample["messages"]
        assert [part["type"] for part in user["content"]] == ["image", "text"]
        assert user["content"][1]["text"] == "What?"
        assert assistant["content"] == [{"type": "text", "text": "Red."}]
        assert index.image_sizes(number).tolist() == [[7, 4]]
        assert index.read_images(number)[0] in members.values()
        assert index.text_tokens[number] == index.text_tokens[0]
    assert index.read_sample(3)["metadata"] == {"id": 3}
    assert index.read_sample(6)["metadata"] == {"source": "ours"}
    assert index.totals["unused_images"] == 1


def test_two_pictures_in_the_order_of_the_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    members = {
        "b.png": picture(2, 2),
        "a.png": picture(3, 3),
        "json": {
            "image": ["a.png", "b.png"],
            "conversations": said("From <image> to <image>", "Larger."),
        },
    }
    index = index_of(tmp_path, tokenizer, {"k": members})
    assert index.image_sizes(0).tolist() == [[3, 3], [2, 2]]
    kinds = [part["type"] for part in index.read_sample(0)["messages"][0]["content"]]
    assert kinds == ["text", "image", "text", "image"]


FAULTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "film": (
        {"mp4": b"x", "json": {"conversations": said("What?", "A ball.")}},
        "media that is not read",
        "a member film.mp4",
    ),
    "drawing": (
        {"svg": b"<svg/>", "txt": b"A cat."},
        "media that is not read",
        "drawing.svg is of a kind that is not read",
    ),
    "pointer": (
        {"jpg": b"version https://git-lfs.github.com/spec/v1", "txt": b"A cat."},
        "unreadable image",
        "git lfs pull",
    ),
    "id": (
        {"json": {"image_id": 7, "question": "What?", "answer": "Red."}},
        "unusable text",
        "'image_id', which is or names media",
    ),
    "sound": ({"wav": b"x", "txt": b"A word."}, "media that is not read", "a member sound.wav"),
    "key": (
        {"jpg": picture(), "json": {"video": "v.mp4", "conversations": said("What?", "A.")}},
        "unusable text",
        "'video', and only pictures",
    ),
    "count": (
        {"jpg": picture(), "json": {"conversations": said("<image><image>", "A.")}},
        "unusable text",
        "2 <image> in the text for 1 images",
    ),
    "claim": (
        {"json": {"conversations": said("<image> What?", "A.")}},
        "unusable text",
        "1 <image> in the text for 0 images",
    ),
    "which": (
        {
            "0.png": picture(),
            "1.png": picture(),
            "json": {"image": "x.png", "conversations": said("What?", "A.")},
        },
        "missing image",
        "names an image 'x.png': none of the members 0.png, 1.png",
    ),
    "own": (
        {
            "json": {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "See <image>"}]},
                    {"role": "assistant", "content": [{"type": "text", "text": "A."}]},
                ]
            }
        },
        "unusable text",
        "1 <image> in the text for 0 images",
    ),
    "empty": (
        {"jpg": picture(), "json": {"conversations": said("What?", " ")}},
        "unusable text",
        "turn 1 is an empty answer",
    ),
}


def test_what_cannot_be_used_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    faulty = {key: members for key, (members, _, _) in FAULTS.items()}
    index = index_of(tmp_path, tokenizer, {"good": RECORDS["llava"], **faulty})
    assert index.keys.tolist() == ["good"]
    found = {bad.key: (bad.fault, bad.reason) for bad in index.bad}
    assert found.keys() == FAULTS.keys()
    for key, (_, fault, reason) in FAULTS.items():
        assert found[key][0] == fault and reason in found[key][1], found[key]


def test_what_systems_leave_behind_is_no_sample(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    members = {"jpg": picture(), "txt": b"A cat."}
    keys = ("a", "./b", "c/d", "__MACOSX/a", "x/.ipynb_checkpoints/a", "@eaDir/a", "._a")
    index = index_of(tmp_path, tokenizer, dict.fromkeys(keys, members))
    assert index.keys.tolist() == ["a", "./b", "c/d"]
    assert index.bad == []
    assert "members passed over, of no sample" in (printed := capsys.readouterr().out)
    assert ".jpg 3, .txt 3" in printed and "hidden 2" in printed


def test_what_tells_of_the_data_is_no_sample(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unless it is one: a key that begins with "_", and a README that holds messages."""
    picture_and_text = {"jpg": picture(), "txt": b"A cat."}
    index = index_of(
        tmp_path,
        tokenizer,
        {
            "a": picture_and_text,
            "_b": picture_and_text,
            "c/readme": {"json": {"messages": said("Hi", "Ho")}},
            **{"README": {"md": b"x"}, "deep/LICENSE": {"txt": b"x"}, "_stats": {"json": {"a": 1}}},
            "dataset_info": {"json": {"features": {}}},
            **{"__meta__": {"json": {"messages": []}}, "__x__": picture_and_text},
            **{"Thumbs": {"db": b"x"}, "orphan": {"txt": b"A dog."}},
        },
    )
    assert index.keys.tolist() == ["a", "_b", "c/readme"]
    assert [bad.key for bad in index.bad] == ["orphan"]
    printed = capsys.readouterr().out
    for name in ("README.md", "LICENSE.txt", "_stats.json", "dataset_info.json", "__meta__.json"):
        assert f"{name} 1" in printed
    assert "__x__.jpg 1" in printed and ".db 1" in printed


def test_other_shards_beside_those_that_are_read(tmp_path: Path, tokenizer: Tokenizer) -> None:
    index_of(tmp_path, tokenizer, {"a": RECORDS["llava"]})
    assert passed_over(str(tmp_path)) == []
    (tmp_path / "deep").mkdir()
    (tmp_path / "0.tar").rename(tmp_path / "deep" / "0.tar")
    with pytest.raises(InputError, match=rf"name the folders that hold some: {tmp_path}/deep"):
        build_index(str(tmp_path), tokenizer, CHAT)
    (tmp_path / "1.tar").write_bytes((tmp_path / "deep" / "0.tar").read_bytes())
    assert f"hold some: {tmp_path}/deep" in passed_over([str(tmp_path)])[0]
    (tmp_path / "2.tgz").write_bytes(b"\x1f\x8b")
    (tmp_path / "3.TAR.GZ").write_bytes(b"\x1f\x8b")
    assert "but 2.tgz and 1 more" in passed_over([str(tmp_path), "s3://bucket/{0..2}.tar"])[0]


def test_pictures_that_do_not_decode(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Of a truncated file the header is whole: only decoding finds it."""
    jpeg, png = (noise(format) for format in ("JPEG", "PNG"))
    samples = {
        "good": {"jpg": jpeg, "txt": b"A cat."},
        "jpeg": {"jpg": jpeg[: len(jpeg) // 2], "txt": b"A cat."},
        "png": {"png": png[: len(png) // 2], "txt": b"A cat."},
    }
    assert len(index_of(tmp_path, tokenizer, samples)) == 3
    index = index_of(tmp_path, tokenizer, samples, decode=True)
    assert index.keys.tolist() == ["good"]
    assert {bad.fault for bad in index.bad} == {"unreadable image"}
    # What was decoded once is not decoded again, nor forgotten.
    build_index(str(tmp_path), tokenizer, CHAT)
    assert load_index(str(tmp_path), tokenizer, CHAT).fingerprint == index.fingerprint


def test_a_store_that_fails_is_no_fault_of_a_sample(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At whichever read: the run ends, and nothing is left out."""
    captioned = {"jpg": picture(), "json": {"caption": "Red."}, "txt": b"Red."}
    index_of(tmp_path, tokenizer, {"a": RECORDS["llava"], "b": captioned})
    read, reads, failing = ReadAhead.read, 0, -1

    def fail(self: ReadAhead, offset: int, size: int) -> bytes:
        nonlocal reads
        reads += 1
        if reads - 1 == failing:
            raise InputError("the store does not answer")
        return read(self, offset, size)

    monkeypatch.setattr(ReadAhead, "read", fail)
    shard = Shard(str(tmp_path / "0.tar"))
    assert not index_shard(shard, tokenizer, CHAT, Storage())[0].bad
    total = reads
    assert total > 10
    for number in range(total):
        reads, failing = 0, number
        with pytest.raises(InputError, match="does not answer") as caught:
            index_shard(shard, tokenizer, CHAT, Storage())
        assert not isinstance(caught.value, ShardFault)
