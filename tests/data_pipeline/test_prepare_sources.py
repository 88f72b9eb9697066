"""A source is told by its content: lists of datasets, ImageFolders, captioned folders, records."""

import base64
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from data_pipeline.config_file import load_settings
from data_pipeline.errors import InputError
from data_pipeline.prepare.__main__ import main
from data_pipeline.settings import DataConfig
from tests.data_pipeline.shards import read_shards
from tests.data_pipeline.stores import open_store

ROOT = Path(__file__).parents[2]


def picture(path: Path, format: str = "PNG") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), "red").save(path, format)
    return path


def llava(*names: str) -> list[dict[str, Any]]:
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Red."}]
    return [{"id": f"{i}", "image": name, "conversations": turns} for i, name in enumerate(names)]


def report_of(out: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((out / "prepare.json").read_text())
    return report


def test_a_captioned_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source"
    for name, format in (
        *(("a.jpg", "JPEG"), ("b.JFIF", "JPEG"), ("c.ppm", "PPM"), ("d", "PNG")),
        *(("e.jpg_large", "JPEG"), ("f.png", "PNG"), ("g.png", "PNG"), ("h.apng", "PNG")),
    ):
        picture(source / name, format)
    for name, text in (
        *(("a.TXT", "upper"), ("b.txt", "jfif\r\nline"), ("c.caption", "kohya"), ("d.txt", "none")),
        *(("e.txt", "large"), ("f.png.txt", "double"), ("g.txt", " "), ("orphan.txt", "no image")),
    ):
        (source / name).write_bytes(text.encode())
    (source / "g.json").write_text('{"Caption": ["in JSON"]}')
    (source / "h.txt").write_text("animated")
    (source / "i.svg").write_text("<svg/>")
    (source / "i.txt").write_text("not read")
    picture(source / "linked-from" / "x.png")
    (source / "linked-from" / "x.txt").write_text("linked")
    assert main([str(source), str(tmp_path / "out")]) == 0
    captions = {
        sample["__key__"]: sample["json"]["messages"][1]["content"][0]["text"]
        for sample in read_shards(tmp_path / "out")
    }
    assert captions == {
        "a": "upper",
        "b": "jfif\nline",
        "c": "kohya",
        "d": "none",
        "e": "large",
        "f": "double",
        "g": "in JSON",
        "h": "animated",
        "linked-from_x": "linked",
    }
    assert report_of(tmp_path / "out")["passed_over"]["by suffix"] == {".txt": 2, ".svg": 1}
    printed = capsys.readouterr().out
    assert "captions beside images" in printed and ".svg 1" in printed


def test_an_image_folder_of_hugging_face(tmp_path: Path) -> None:
    source = tmp_path / "train"
    picture(source / "deep" / "a.png")
    picture(source / "b.png")
    (source / "metadata.csv").write_text("file_name,text\ndeep/a.png,A cat.\nb.png,A dog.\n")
    assert main([str(source), str(tmp_path / "out")]) == 0
    samples = read_shards(tmp_path / "out")
    answers = [sample["json"]["messages"][1]["content"][0]["text"] for sample in samples]
    assert answers == ["A cat.", "A dog."]
    assert all("0.png" in sample for sample in samples)


def test_what_may_be_read_in_two_ways_is_an_error_that_lists_them(tmp_path: Path) -> None:
    source = tmp_path / "source"
    picture(source / "a.png")
    (source / "a.txt").write_text("A cat.")
    pq.write_table(pa.table({"question": ["?"], "answer": ["!"]}), source / "t.parquet")
    with pytest.raises(InputError, match=r"1 parquet files or as 1 captions .*--format"):
        main([str(source), str(tmp_path / "out")])
    assert main(["--format", "folder", str(source), str(tmp_path / "folder")]) == 0
    assert main(["--format", "records", str(source), str(tmp_path / "records")]) == 0
    assert len(read_shards(tmp_path / "records")) == 1
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "a.svg").write_text("<svg/>")
    with pytest.raises(InputError, match=r"holds nothing that is read: .*1 files \(\.svg\)"):
        main([str(tmp_path / "nothing"), str(tmp_path / "out")])


@pytest.mark.parametrize("name", ["meta.json", "data.yaml"])
def test_a_list_of_datasets(name: str, tmp_path: Path) -> None:
    picture(tmp_path / "images" / "a.png")
    for dataset, count in (("first", 10), ("second", 4)):
        (tmp_path / f"{dataset}.json").write_text(json.dumps(llava(*["a.png"] * count)))
    listed: Any = {
        name: {"root": "images", "annotation": f"{name}.json", "repeat_time": repeat}
        for name, repeat in (("first", 1), ("second", 2.5))
    }
    if name == "data.yaml":
        listed = {
            "datasets": [
                {"json_path": "first.json", "sampling_strategy": "first:40%"},
                {"json_path": "second.json", "sampling_strategy": "end:3"},
            ]
        }
    (tmp_path / name).write_text(json.dumps(listed))  # JSON is YAML
    out = tmp_path / "out"
    options = ["--images", str(tmp_path / "images")] if name == "data.yaml" else []
    assert main([str(tmp_path / name), *options, str(out)]) == 0
    counts = {part: len(read_shards(out / part)) for part in ("first", "second")}
    config = yaml.safe_load((out / "mixture.yaml").read_text())
    weights = {part: entry["weight"] for part, entry in config["data"]["datasets"].items()}
    if name == "meta.json":
        assert (counts, weights) == ({"first": 10, "second": 4}, {"first": 10, "second": 10})
    else:
        assert (counts, weights) == ({"first": 4, "second": 3}, {"first": 4, "second": 3})
        keys = [sample["json"]["metadata"]["entry"] for sample in read_shards(out / "second")]
        assert keys == [1, 2, 3]
    # The section is one that a config takes as it is.
    config["data"] |= {"tokenizer": "t.model", "pack": {"packs_per_step": 1}}
    config["model"] = {part: {"config": {"model_type": "qwen2"}} for part in ("vision", "llm")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    settings = load_settings(DataConfig, tmp_path / "config.yaml")
    assert list(settings.data.sources) == ["first", "second"]


def test_a_list_goes_on_where_it_was_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Typed again, the command keeps what is finished, and says so; other settings are named."""
    for name in ("first", "second"):
        (tmp_path / f"{name}.json").write_text(json.dumps(llava("")))
    listed = {name: {"root": "", "annotation": f"{name}.json"} for name in ("first", "second")}
    (tmp_path / "meta.json").write_text(json.dumps(listed))
    out = tmp_path / "out"
    command = [str(tmp_path / "meta.json"), str(out)]
    assert main(command) == 0
    whole = (out / "mixture.yaml").read_bytes()
    made = (out / "first" / "000000.tar").stat().st_mtime_ns
    shutil.rmtree(out / "second")  # as if killed before it and the section
    (out / "mixture.yaml").unlink()
    capsys.readouterr()
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "first: kept" in printed and "second: kept" not in printed
    assert (out / "first" / "000000.tar").stat().st_mtime_ns == made
    assert (out / "mixture.yaml").read_bytes() == whole and (out / "second").is_dir()
    for options, differing in (
        (["--samples-per-shard", "7"], "samples_per_shard was 2000, now 7"),
        (["--ignore", "source"], r"ignore was \[\], now \['source'\]"),
    ):
        with pytest.raises(InputError, match=rf"first is there .*{differing}.*--overwrite"):
            main([*command, *options])
    (tmp_path / "second.json").write_text(json.dumps(llava("", "")))
    with pytest.raises(InputError, match=r"second is there .*source_bytes was"):
        main(command)
    assert main([*command, "--overwrite"]) == 0
    assert len(read_shards(out / "second")) == 2
    (out / "first" / "prepare.json").write_text("{")
    with pytest.raises(InputError, match=r"prepare\.json is damaged; remove"):
        main(command)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"a": {"annotation": "x.json", "repeat_time": 0}}, "repeat_time of a is 0"),
        ({"datasets": [{"json_path": "x", "sampling_strategy": "some"}]}, "'some', expected all"),
        ({"datasets": [{"path": "x"}]}, "no 'json_path'"),
        ({"datasets": [{"json_path": "x/a.json"}, {"json_path": "y/a.json"}]}, "a twice"),
        ([], "names no datasets"),
    ],
)
def test_a_list_that_is_none(content: Any, expected: str, tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_text(json.dumps(content))
    with pytest.raises(InputError, match=expected):
        main(["--format", "mixture", str(tmp_path / "data.yaml"), str(tmp_path / "out")])


def test_too_many_left_out_is_an_exit_status(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "data.json").write_text(json.dumps(llava("a.png", "none.png", "a.png")))
    command = [sys.executable, "-m", "data_pipeline.prepare", str(tmp_path / "data.json")]
    for options, code in ((["--max-bad-fraction", ".5"], 0), (["--overwrite"], 1)):
        arguments = [*command, str(tmp_path / "out"), *options]
        done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        assert "records of turns (under 'conversations')" in done.stdout
        assert "1 faulty samples skipped" in done.stdout
    assert "33.3 % of the samples could not be used" in done.stderr
    report = report_of(tmp_path / "out")
    assert (report["read"], report["samples"], len(report["skipped"])) == (3, 2, 1)
    assert list(report["reasons"].values()) == [1]


def test_paths_of_pictures(tmp_path: Path) -> None:
    images = tmp_path / "images"
    inside = base64.b64encode(picture(images / "sub" / "a.png").read_bytes()).decode()
    (tmp_path / "link").symlink_to(images)
    names = [
        *("sub/a.png", "./sub/a.png", "sub//a.png", "sub/../sub/a.png", "sub\\a.png"),
        *(str(images / "sub" / "a.png"), f"file://{images}/sub/a.png"),
        str(tmp_path / "link" / "sub" / "a.png"),
        *(f"file://localhost{images}/sub/a.png", f"file://{images}/s%75b/a.png"),
        *(f"data:image/png;base64,{inside[:9]}\n{inside[9:]}", inside),
    ]
    (tmp_path / "data.json").write_text(json.dumps(llava(*names)))
    arguments = [str(tmp_path / "data.json"), str(tmp_path / "out")]
    assert main([*arguments, "--images", str(tmp_path / "link")]) == 0
    assert len(read_shards(tmp_path / "out")) == len(names)


def table(path: Path, *answers: str, source: str | None = None) -> None:
    data = picture(path.parent / "picture.png").read_bytes()
    rows = [
        {"image": {"bytes": None if source else data, "path": source}, "question": "?", "answer": a}
        for a in answers
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.mark.parametrize("below", ["", "/*.parquet", "/b.parquet"])
@pytest.mark.parametrize("protocol", ["hf", "s3", "http"])
def test_parquet_is_read_where_it_lies(protocol: str, below: str, tmp_path: Path) -> None:
    """With a request that fails on the way; of HTTP only a file, since it lists nothing."""
    if protocol == "http" and below != "/b.parquet":
        pytest.skip("HTTP lists no files")
    table(tmp_path / "store" / "a.parquet", "Red.", "")
    table(tmp_path / "store" / "b.parquet", "Blue.")
    with open_store(protocol, tmp_path / "store") as store:
        options = [f"--storage-option={name}={json.dumps(v)}" for name, v in store.options.items()]
        store.server.faults.extend(["", "503"])
        status = main([f"{store.url}{below}", str(tmp_path / "out"), *options])
    assert not store.server.faults
    samples = read_shards(tmp_path / "out")
    answers = [sample["json"]["messages"][1]["content"][0]["text"] for sample in samples]
    assert answers == (["Blue."] if below == "/b.parquet" else ["Red.", "Blue."])
    assert status == (0 if below == "/b.parquet" else 1)
    assert all("0.png" in sample for sample in samples)
    report = report_of(tmp_path / "out")
    if below != "/b.parquet":
        [skipped] = report["skipped"]
        assert "a.parquet, row 1" in skipped["sample"] and "no answer" in skipped["reason"]


def test_shards_are_for_the_index(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(bytes(10240))
    with pytest.raises(InputError, match=r"\.tar: shards, which .*data_pipeline\.index"):
        main([str(tmp_path), str(tmp_path / "out")])


def test_sources_behind_a_url_that_cannot_be_read(tmp_path: Path) -> None:
    table(tmp_path / "store" / "a.parquet", "Red.", source="photos/a.png")
    out = str(tmp_path / "out")
    with open_store("hf", tmp_path / "store") as store:
        options = [f"--storage-option={name}={json.dumps(v)}" for name, v in store.options.items()]
        for url, message in (
            (f"{store.url}/none.parquet", r"none\.parquet does not exist"),
            (f"{store.url}/*.jsonl", "no parquet file"),
            (f"{store.url}/a.parquet", "'photos/a.png' is a path; name its folder with --images"),
        ):
            with pytest.raises(InputError, match=message):
                main([url, out, *options])
        with pytest.raises(InputError, match=r"only records .* URL"):
            main(["--format", "folder", store.url, out])
        picture(tmp_path / "here" / "photos" / "a.png")
        assert main([store.url, out, "--images", str(tmp_path / "here"), *options]) == 0
    with pytest.raises(InputError, match="OUT is the URL s3://bucket/out"):
        main([str(tmp_path), "s3://bucket/out"])
