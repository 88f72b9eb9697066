"""Index of real webdataset shards: columns, bad samples, restarts, and every mismatch."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

import data_pipeline.index.builder as build_module
from data_pipeline.chat import ChatSettings, image_names, parse_sample, tokenize_chat
from data_pipeline.errors import InputError
from data_pipeline.files import file_lock
from data_pipeline.index import BadSample, Index, build_index, load_index
from data_pipeline.index.__main__ import main
from data_pipeline.index.columns import COLUMNS
from data_pipeline.index.index_files import IndexFiles
from data_pipeline.storage import Shard
from data_pipeline.tokenizer import Tokenizer, load_tokenizer
from tests.data_pipeline.small_tokenizers import save_sentencepiece

CHAT = ChatSettings()
Sample = dict[str, Any]


def picture(width: int, height: int, kind: str = "PNG") -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (width, height), (width % 256, height % 256, 0)).save(buffer, kind)
    return buffer.getvalue()


def make_sample(key: str, images: dict[str, bytes], answer: str = "A cell.") -> Sample:
    parts = [{"type": "image", "image": name} for name in images]
    messages = [
        {"role": "user", "content": [*parts, {"type": "text", "text": f"What is {key}?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
    return {"__key__": key, "json": json.dumps({"messages": messages}).encode(), **images}


def ordinary(number: int) -> Sample:
    """A sample with number % 3 images of sizes that no other has."""
    images = {f"{j}.png": picture(10 + number, 20 + j) for j in range(number % 3)}
    return make_sample(f"{number:04d}", images, "é " * (1 + number % 5))


def write_shard(path: Path, samples: list[Sample]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        for sample in samples:
            writer.write(sample)
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(save_sentencepiece(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A folder of three shards with four samples each, written by webdataset's ShardWriter."""
    pattern = str(tmp_path / "train" / "shard-%06d.tar")
    (tmp_path / "train").mkdir()
    with webdataset.ShardWriter(pattern, maxcount=4, verbose=0, encoder=False) as writer:
        for number in range(12):
            writer.write(ordinary(number))
    return tmp_path / "train"


@pytest.fixture
def indexed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the shards that are read, as it happens."""
    seen: list[str] = []
    original = build_module.index_shard

    def counting(shard: Shard, *rest: Any) -> Any:
        seen.append(shard.name)
        return original(shard, *rest)

    monkeypatch.setattr(build_module, "index_shard", counting)
    yield seen


def build_and_load(folder: Path, tokenizer: Tokenizer, chat: ChatSettings = CHAT) -> Index:
    build_index(str(folder), tokenizer, chat)
    return load_index(str(folder), tokenizer, chat)


def assert_same_index(a: Index, b: Index) -> None:
    assert (a.shards, a.fingerprint, a.bad) == (b.shards, b.fingerprint, b.bad)
    assert a.totals == b.totals
    for name in [*COLUMNS, "keys"]:
        np.testing.assert_array_equal(a.join(name), b.join(name))


def test_columns_describe_what_webdataset_reads(shards: Path, tokenizer: Tokenizer) -> None:
    index = build_and_load(shards, tokenizer)
    pipeline = webdataset.WebDataset([p.url for p in index.shards], shardshuffle=False)
    expected = list(pipeline)
    assert len(index) == len(expected) == 12
    assert [p.name for p in index.shards] == [f"shard-{k:06d}.tar" for k in range(3)]
    for i, sample in enumerate(expected):
        assert index.keys[i] == sample["__key__"]
        assert index.name(i) == f"{Path(sample['__url__']).name}:{sample['__key__']}"
        assert index.read_text(i) == sample["json"]
        messages = parse_sample(sample["json"])["messages"]
        assert index.read_images(i) == [sample[name] for name in image_names(messages)]
        images = slice(index.image_start[i], index.image_start[i + 1])
        sizes = list(zip(index.image_width[images], index.image_height[images], strict=True))
        assert sizes == [(10 + i, 20 + j) for j in range(i % 3)]
        chat = tokenize_chat(messages, tokenizer, CHAT)
        assert index.text_tokens[i] == len(chat.input_ids)
        assert index.supervised_tokens[i] == sum(chat.supervised)
        assert (
            index.key(i) == sample["__key__"] and index.shard_name(i) == f"shard-{i // 4:06d}.tar"
        )
        assert index.read_sample(i) == {"messages": messages, "metadata": {}}
        assert index.image_sizes(i).tolist() == [[10 + i, 20 + j] for j in range(i % 3)]
    for name, dtype in COLUMNS.items():
        assert index.join(name).dtype == dtype, name
    assert index.shard.dtype == np.int32 and index.shard.tolist() == [i // 4 for i in range(12)]
    assert index.sizes.tolist() == [4, 4, 4] and index.starts.tolist() == [0, 4, 8, 12]
    assert index.image_start.shape == (13,) and index.image_start[-1] == index.images == 12
    assert index.totals == {
        "samples": 12,
        "images": 12,
        "text_tokens": index.text_tokens.sum(),
        "supervised_tokens": index.supervised_tokens.sum(),
        "unused_images": 0,
    }
    assert index.bad == []
    for beyond in (-1, 12):
        with pytest.raises(IndexError, match=f"sample {beyond} of 12"):
            index.name(beyond)


def test_shards_without_any_image(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_shard(tmp_path / "a.tar", [make_sample("a", {}), make_sample("b", {})])
    index = build_and_load(tmp_path, tokenizer)
    assert len(index) == 2 and index.image_start.tolist() == [0, 0, 0]
    assert index.images == len(index.join("image_crc")) == 0
    assert index.read_images(1) == [] and index.image_sizes(1).shape == (0, 2)


def test_an_image_may_be_used_twice_and_exif_turns_it(tmp_path: Path, tokenizer: Tokenizer) -> None:
    buffer = BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (30, 20)).save(buffer, "JPEG", exif=exif)
    sample = make_sample("a", {"0.jpg": buffer.getvalue()})
    content = json.loads(sample["json"])
    content["messages"][0]["content"] *= 2
    sample["json"] = json.dumps(content).encode()
    write_shard(tmp_path / "a.tar", [sample])
    index = build_and_load(tmp_path, tokenizer)
    assert index.image_width.tolist() == [20, 20] and index.image_height.tolist() == [30, 30]
    assert index.read_images(0) == [sample["0.jpg"]] * 2


def bomb(width: int) -> bytes:
    """A PNG of a few bytes whose header claims width x width pixels."""
    data = bytearray(picture(1, 1))
    data[16:24] = width.to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def test_bad_samples_are_left_out_and_listed(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = make_sample("missing", {"0.png": picture(3, 3)})
    missing["1.png"] = missing.pop("0.png")
    fewer = make_sample("fewer", {"0.png": picture(3, 3), "1.png": picture(3, 3)})
    del fewer["1.png"]
    last_turn = make_sample("order", {})
    last_turn["json"] = last_turn["json"].replace(b'"assistant"', b'"user"')
    extra = make_sample("good2", {"0.png": picture(7, 8)})
    extra["1.png"] = picture(1, 1)
    write_shard(
        tmp_path / "a.tar",
        [
            make_sample("good1", {"0.png": picture(5, 6)}),
            {"__key__": "syntax", "json": b'{"messages": ['},
            {"__key__": "empty", "json": b""},
            {"__key__": "deep", "json": b"[" * 200_000},
            {"__key__": "utf16", "json": "{}".encode("utf-16")},
            {"__key__": "schema", "json": b'{"conversations": []}'},
            {"__key__": "list", "json": b"[]"},
            {"__key__": "metadata", "json": b'{"messages": [], "metadata": 3}'},
            {**make_sample("surrogate", {}), "json": make_sample("\ud800", {})["json"]},
            last_turn,
            make_sample("header", {"0.png": b"no picture"}),
            make_sample("zero", {"0.png": b""}),
            make_sample("bomb", {"0.png": bomb(10_000)}),
            make_sample("bigger", {"0.png": bomb(50_000)}),
            missing,
            fewer,
            {"__key__": "lonely", "0.png": picture(3, 3)},
            make_sample("twice", {}),
            extra,
            make_sample("twice", {}),
        ],
    )
    index = build_and_load(tmp_path, tokenizer)
    assert index.keys.tolist() == ["good1", "good2"]
    assert index.image_width.tolist() == [5, 7]
    reasons = {
        "syntax": ("unusable text", "does not parse"),
        "empty": ("unusable text", "does not parse"),
        "deep": ("unusable text", "nested too deeply"),
        "utf16": ("unusable text", "not UTF-8"),
        "schema": ("unusable text", "conversations"),
        "list": ("unusable text", "not an object"),
        "metadata": ("unusable text", '"metadata" is a int'),
        "surrogate": ("unusable text", "lone surrogate"),
        "order": ("unusable text", "turn 1 has the role 'user'"),
        "header": ("unreadable image", "image '0.png'"),
        "zero": ("unreadable image", "image '0.png'"),
        "bomb": ("unreadable image", "image too large"),
        "bigger": ("unreadable image", "image too large"),
        "missing": ("missing image", "no member 'missing.0.png'"),
        "fewer": ("missing image", "no member 'fewer.1.png'"),
        "lonely": ("no text member", "no member lonely.json beside 0.png"),
        "twice": ("unsafe or duplicate members", "two members are named 'twice.json'"),
    }
    assert {bad.key for bad in index.bad} == reasons.keys()
    printed = capsys.readouterr().out
    manifest = json.loads((tmp_path / "index" / "manifest.json").read_text())
    assert manifest["totals"]["bad"] == len(reasons)
    for bad in index.bad:
        fault, reason = reasons[bad.key]
        assert bad == BadSample("a.tar", bad.key, bad.reason, fault) and reason in bad.reason
        entry = {"key": bad.key, "fault": fault, "reason": bad.reason}
        assert entry in manifest["shards"]["a.tar"]["bad"]
    assert sum("left out a.tar:" in line for line in printed.splitlines()) == 10
    assert (
        "left out 17 of 19 samples (unusable text: 9, unreadable image: 4, missing image: 2, "
        in printed
    )
    assert "images that no message names (not used): 1\n" in printed
    assert index.totals["unused_images"] == 1


def test_many_bad_samples_are_counted_not_all_printed(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [{"__key__": f"{k}", "json": b""} for k in range(15)]
    write_shard(tmp_path / "a.tar", [*bad, make_sample("good", {})])
    build_index(str(tmp_path), tokenizer, CHAT)
    printed = capsys.readouterr().out
    assert printed.count("does not parse") == 10 and "5 more samples of a.tar" in printed


def test_huge_json_is_a_bad_sample(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.index.sample_row._MAX_TEXT_BYTES", 1000)
    write_shard(tmp_path / "a.tar", [make_sample("a", {}), make_sample("b", {}, "x" * 1000)])
    index = build_and_load(tmp_path, tokenizer)
    assert index.keys.tolist() == ["a"] and "more than 1000" in index.bad[0].reason


def test_unchanged_shards_are_not_read_again(
    shards: Path, tokenizer: Tokenizer, indexed: list[str]
) -> None:
    first = build_and_load(shards, tokenizer)
    names = [path.name for path in first.shards]
    assert indexed == names
    assert_same_index(build_and_load(shards, tokenizer), first)
    assert indexed == names
    # A shard that changed is the only one to be read again, even if its size is the same.
    one = first.shards[1].path
    os.utime(one, ns=(0, one.stat().st_mtime_ns + 1))
    assert build_and_load(shards, tokenizer).fingerprint == first.fingerprint  # same content
    assert indexed == [*names, one.name]
    write_shard(one, [ordinary(40), ordinary(41)])
    second = build_and_load(shards, tokenizer)
    assert indexed == [*names, one.name, one.name]
    assert second.fingerprint != first.fingerprint and len(second) == 10
    # Another tokenizer or template: all of them.
    build_and_load(shards, tokenizer, ChatSettings(system="Other."))
    assert indexed == [*names, one.name, one.name, *names]


def test_killed_half_way_leaves_the_earlier_index_and_goes_on(
    shards: Path, tokenizer: Tokenizer, indexed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save = build_module.save_columns
    saved = 0

    def failing(*arguments: Any) -> None:
        nonlocal saved
        saved += 1
        if saved == 3:
            raise KeyboardInterrupt
        save(*arguments)

    # The first index: absent until it is complete.
    monkeypatch.setattr(build_module, "save_columns", failing)
    with pytest.raises(KeyboardInterrupt):
        build_index(str(shards), tokenizer, CHAT)
    with pytest.raises(InputError, match="not indexed"):
        load_index(str(shards), tokenizer, CHAT)
    first = build_and_load(shards, tokenizer)
    assert indexed == [
        *(p.name for p in first.shards),
        first.shards[2].name,
    ]  # only the third again
    assert not (shards / "index" / "partial").exists()
    # A later one, for another template: the earlier stays usable.
    saved, other = 0, ChatSettings(system="Other.")
    with pytest.raises(KeyboardInterrupt):
        build_index(str(shards), tokenizer, other)
    assert_same_index(load_index(str(shards), tokenizer, CHAT), first)
    build_and_load(shards, tokenizer, other)


def test_nothing_is_written_where_nothing_changed(shards: Path, tokenizer: Tokenizer) -> None:
    def written() -> dict[str, int]:
        return {p.name: p.stat().st_mtime_ns for p in [shards, *(shards / "index").iterdir()]}

    build_and_load(shards, tokenizer)
    before = written()
    build_and_load(shards, tokenizer)
    assert written() == before
    sorted(shards.glob("*.tar"))[0].unlink()  # a shard that is gone leaves the list
    assert len(build_and_load(shards, tokenizer).shards) == len(list(shards.glob("*.tar")))
    assert written()["manifest.json"] != before["manifest.json"]


def test_a_second_run_waits_for_the_first(shards: Path, tokenizer: Tokenizer) -> None:
    (shards / "index").mkdir()
    command = [sys.executable, "-m", "data_pipeline.index", str(shards)]
    command += ["--tokenizer", tokenizer.source, "--system", CHAT.system]
    with file_lock(shards / "index/.lock"):
        second = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert second.stderr is not None
        assert "waiting for another process that works in" in second.stderr.readline()
        build_index(str(shards), tokenizer, CHAT)
        manifest = (shards / "index/manifest.json").stat().st_mtime_ns
    assert second.wait(timeout=60) == 0, second.stderr.read()
    load_index(str(shards), tokenizer, CHAT)
    assert (shards / "index/manifest.json").stat().st_mtime_ns >= manifest


def test_killed_while_publishing_is_noticed(
    shards: Path, tokenizer: Tokenizer, indexed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build_index(str(shards), tokenizer, CHAT)
    other = ChatSettings(system="Other.")
    with monkeypatch.context() as patch:
        patch.setattr(IndexFiles, "write_manifest", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build_index(str(shards), tokenizer, other)
    index = load_index(str(shards), tokenizer, CHAT)
    with pytest.raises(InputError, match=r"cut short.*; run: python -m"):
        index.columns(0)
    indexed.clear()
    build_and_load(shards, tokenizer, other)
    assert indexed == []


def test_a_subset_leaves_the_other_shards_indexed(shards: Path, tokenizer: Tokenizer) -> None:
    whole = build_and_load(shards, tokenizer)
    build_index(whole.shards[0].url, tokenizer, ChatSettings(system="Other."))
    rest = load_index([p.url for p in whole.shards[1:]], tokenizer, CHAT)
    assert len(rest) == 8
    whole.shards[2].path.unlink()
    build_index(whole.shards[0].url, tokenizer, CHAT)
    manifest = json.loads((shards / "index" / "manifest.json").read_text())
    assert sorted(manifest["shards"]) == ["shard-000000.tar", "shard-000001.tar"]


def test_several_folders_are_joined_in_sorted_order(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_shard(tmp_path / "b" / "x.tar", [ordinary(4), ordinary(5)])
    write_shard(tmp_path / "a" / "y.tar", [ordinary(1), ordinary(2)])
    write_shard(tmp_path / "a" / "x.tar", [ordinary(3)])
    patterns = [str(tmp_path / "b"), str(tmp_path / "a")]
    build_index(patterns, tokenizer, CHAT)
    assert (tmp_path / "a" / "index" / "manifest.json").exists()
    assert (tmp_path / "b" / "index" / "x.npz").exists()
    index = load_index(patterns, tokenizer, CHAT)
    assert index.keys.tolist() == ["0003", "0001", "0002", "0004", "0005"]
    assert index.shard.tolist() == [0, 1, 1, 2, 2]
    assert index.image_start.tolist() == [0, 0, 1, 3, 4, 6]
    assert [len(index.read_images(i)) for i in range(5)] == [0, 1, 2, 1, 2]


def test_workers_give_the_same_index(shards: Path, tokenizer: Tokenizer) -> None:
    one = build_and_load(shards, tokenizer)
    shutil.rmtree(shards / "index")
    (shards / "broken.tar").write_bytes(b"")
    with pytest.raises(InputError, match=r"broken\.tar is empty"):
        build_index(str(shards), tokenizer, CHAT, workers=2, strict=True)
    (shards / "broken.tar").unlink()
    build_index(str(shards), tokenizer, CHAT, workers=2)
    assert_same_index(load_index(str(shards), tokenizer, CHAT), one)


def test_a_copied_data_set_keeps_working(
    shards: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    first = build_and_load(shards, tokenizer)
    copy = tmp_path / "elsewhere"
    shutil.copytree(shards, copy, copy_function=shutil.copyfile)  # new modification times
    second = load_index(str(copy), tokenizer, CHAT)
    assert second.fingerprint == first.fingerprint
    assert second.read_images(2) == first.read_images(2)


def test_a_reader_notices_bytes_that_changed(shards: Path, tokenizer: Tokenizer) -> None:
    index = build_and_load(shards, tokenizer)
    for offset, read in [
        (index.columns(0).text_offset[2], index.read_sample),
        (index.columns(0).image_offset[index.image_start[2]], index.read_images),
    ]:
        with index.shards[0].path.open("r+b") as file:
            file.seek(int(offset) + 3)
            file.write(b"\x00\xff")
        with pytest.raises(InputError, match=r"shard-000000\.tar .*index again"):
            read(2)


def test_a_replaced_shard_is_opened_anew(
    shards: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    shard = shards / "shard-000000.tar"
    index = build_and_load(shards, tokenizer)
    index.read_text(0)  # it stays open
    write_shard(tmp_path / "new.tar", [ordinary(50), ordinary(51)]).replace(shard)
    index = build_and_load(shards, tokenizer)
    assert index.read_text(1) == ordinary(51)["json"]
    # The same, indexed by another process.
    write_shard(tmp_path / "other" / shard.name, [ordinary(62), ordinary(61)])
    build_index(str(tmp_path / "other"), tokenizer, CHAT)
    index.read_text(1)
    (tmp_path / "other" / shard.name).replace(shard)
    shutil.rmtree(shards / "index")
    (tmp_path / "other" / "index").replace(shards / "index")
    assert load_index(str(shard), tokenizer, CHAT).read_text(1) == ordinary(61)["json"]


def cut(shards: Path) -> None:
    shard = shards / "shard-000001.tar"
    os.truncate(shard, shard.stat().st_size - 11_000)


def empty(shards: Path) -> None:
    (shards / "shard-000001.tar").write_bytes(b"")


def no_sample(shards: Path) -> None:
    write_shard(shards / "shard-000001.tar", [])


def only_bad_samples(shards: Path) -> None:
    write_shard(shards / "shard-000001.tar", [{"__key__": "k", "json": b""}])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut, "is truncated"),
        (empty, "is empty"),
        (no_sample, "has no usable sample (samples are members"),
        (only_bad_samples, "has no usable sample (1 bad ones, the first: k: the JSON does not"),
    ],
)
def test_shards_that_cannot_be_indexed(
    shards: Path, tokenizer: Tokenizer, damage: Callable[[Path], None], reason: str
) -> None:
    first = build_and_load(shards, tokenizer)
    damage(shards)
    (shards / "shard-000000.tar").write_bytes(b"also broken" * 100)
    for _ in range(2):  # what the first run found out, the second one knows
        with pytest.raises(InputError) as caught:
            build_index(str(shards), tokenizer, CHAT, strict=True)
        lines = str(caught.value).splitlines()
        assert len(lines) == 2 and "shard-000000.tar is not an uncompressed tar" in lines[0]
        assert "shard-000001.tar " + reason in lines[1]
        # Untouched shards are still there, as they were.
        assert len(load_index(first.shards[2].url, tokenizer, CHAT)) == 4


def test_shards_that_cannot_be_used_are_left_out_and_listed(
    shards: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    before = build_and_load(shards, tokenizer)
    keys, images = before.keys.tolist(), before.read_images(9)
    empty(shards)
    index = build_and_load(shards, tokenizer)
    assert index.sizes.tolist() == [4, 0, 4]
    assert index.keys.tolist() == [*keys[:4], *keys[8:]]
    assert index.read_images(5) == images
    (bad,) = index.bad
    assert (bad.shard, bad.key, bad.fault) == ("shard-000001.tar", "", "broken shard")
    assert "is empty" in bad.reason
    printed = capsys.readouterr().out
    assert "left out the shard" in printed and "left out 1 of 1 shards" in printed
    with pytest.raises(InputError, match=r"shard-000001\.tar is empty"):
        build_index(str(shards), tokenizer, CHAT, strict=True)
    arguments = [str(shards), "--tokenizer", tokenizer.source, "--system", CHAT.system]
    assert main([*arguments, "--workers", "1"]) == 1
    assert "more than --max-bad-fraction 0.01" in capsys.readouterr().err
    assert main([*arguments, "--workers", "1", "--max-bad-fraction", ".5"]) == 0


def test_no_shard_can_be_used(shards: Path, tokenizer: Tokenizer) -> None:
    for shard in shards.glob("*.tar"):
        shard.write_bytes(b"")
    with pytest.raises(InputError, match="is empty") as caught:
        build_index(str(shards), tokenizer, CHAT)
    assert len(str(caught.value).splitlines()) == 3


def test_a_shard_that_is_still_being_written(
    shards: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = shards / "shard-000000.tar"

    def touching(*arguments: Any, **options: Any) -> Any:
        os.utime(shard, ns=(0, 7))
        return tokenize_chat(*arguments, **options)

    monkeypatch.setattr("data_pipeline.index.sample_row.tokenize_chat", touching)
    with pytest.raises(InputError, match=r"shard-000000\.tar changed"):
        build_index(str(shard), tokenizer, CHAT)


def grow(shards: Path) -> None:
    with (shards / "shard-000001.tar").open("ab") as file:
        file.write(bytes(512))


def add_shard(shards: Path) -> None:
    write_shard(shards / "more.tar", [ordinary(1)])


def remove_index(shards: Path) -> None:
    shutil.rmtree(shards / "index")


def remove_npz(shards: Path) -> None:
    (shards / "index" / "shard-000001.npz").unlink()


def cut_npz(shards: Path) -> None:
    path = shards / "index" / "shard-000001.npz"
    path.write_bytes(path.read_bytes()[:-100])


def swap_npz(shards: Path) -> None:
    shutil.copy(shards / "index" / "shard-000002.npz", shards / "index" / "shard-000001.npz")


def spoil_npz(shards: Path) -> None:
    """One wrong byte in the contents of a column."""
    path = shards / "index" / "shard-000001.npz"
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        column = file.getinfo("text_crc.npy")
    extra = int.from_bytes(data[column.header_offset + 28 : column.header_offset + 30], "little")
    start = column.header_offset + 30 + len(column.filename) + extra
    data[start + column.compress_size - 3] ^= 255
    path.write_bytes(data)


def spoil_manifest(shards: Path) -> None:
    (shards / "index" / "manifest.json").write_text("[]")


def older_schema(shards: Path) -> None:
    path = shards / "index" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 0}))


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        (grow, ["shard-000001.tar has ", " bytes, but its index was made for "]),
        (add_shard, ["more.tar is not in the index ", "manifest.json"]),
        (remove_index, ["manifest.json does not exist"]),
        (remove_npz, ["shard-000001.npz is missing"]),
        (cut_npz, ["shard-000001.npz cannot be read"]),
        (spoil_npz, ["shard-000001.npz cannot be read"]),
        (swap_npz, ["shard-000001.npz does not belong to ", "cut short"]),
        (spoil_manifest, ["manifest.json cannot be read"]),
        (older_schema, ["manifest.json has the schema 0, this version reads 3"]),
    ],
)
def test_an_index_that_does_not_fit_is_refused_then_repaired(
    shards: Path, tokenizer: Tokenizer, change: Callable[[Path], None], reasons: list[str]
) -> None:
    before = build_and_load(shards, tokenizer).join("text_offset")
    change(shards)
    with pytest.raises(InputError) as caught:
        load_index(str(shards), tokenizer, CHAT).columns(1)
    message = str(caught.value)
    for reason in reasons:
        assert reason in message
    assert (
        f"; run: python -m data_pipeline.index {shards} --tokenizer {tokenizer.source}" in message
    )
    # The command it names mends it.
    index = build_and_load(shards, tokenizer)
    if change is not add_shard:
        np.testing.assert_array_equal(index.join("text_offset"), before)


def test_another_tokenizer_or_template_is_refused(
    shards: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    from data_pipeline.tokenizer import train_sentencepiece

    build_index(str(shards), tokenizer, CHAT)
    train_sentencepiece(["other text"] * 9, tmp_path / "other.model", 290)
    other = load_tokenizer(tmp_path / "other.model")
    with pytest.raises(InputError) as caught:
        load_index(str(shards), other, CHAT)
    message = str(caught.value)
    for part in (tokenizer.source, other.source, tokenizer.fingerprint[:12], "manifest.json"):
        assert part in message
    assert message.endswith(
        f"run: python -m data_pipeline.index {shards} --tokenizer {other.source}"
    )
    assert len(build_and_load(shards, other)) == 12
    build_index(str(shards), tokenizer, CHAT)
    with pytest.raises(InputError) as caught:
        load_index(str(shards), tokenizer, ChatSettings(system="It's another."))
    message = str(caught.value)
    for part in ("You are a helpful assistant.", "It's another.", "manifest.json"):
        assert part in message
    assert """--system 'It'"'"'s another.'""" in message


def test_a_folder_that_cannot_be_written(
    shards: Path, tokenizer: Tokenizer, indexed: list[str]
) -> None:
    (shards / "index").write_text("in the way")  # also stops root, whom permissions do not
    with pytest.raises(InputError, match=r"cannot write an index .* name another"):
        build_index(str(shards), tokenizer, CHAT)
    assert indexed == []


def test_command_line(
    shards: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match=r"no tokenizer\.model in .*--tokenizer"):
        main([str(shards)])
    shutil.copy(tokenizer.source, shards.parent / "tokenizer.model")  # one folder up is found
    main([str(shards), "--workers", "1", "--system", ""])
    printed = capsys.readouterr().out
    index = load_index(str(shards), tokenizer, ChatSettings(system=""))
    total = int(index.text_tokens.sum())
    assert f"3 shards, 12 samples, 12 images, {total:,} text tokens" in printed
    assert "0 bad samples" in printed and f"index: {shards}/index/manifest.json" in printed


def test_command_line_as_a_module(shards: Path, tokenizer: Tokenizer) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "data_pipeline.index", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    done = run(str(shards), "--tokenizer", tokenizer.source)
    assert done.returncode == 0, done.stderr
    assert "12 samples" in done.stdout and "index: " in done.stdout
    failed = run(str(shards / "none"), "--tokenizer", tokenizer.source)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ") and "Traceback" not in failed.stderr
    shown = run("--help")
    assert shown.returncode == 0 and "{key}.json" in shown.stdout and "--tokenizer" in shown.stdout
