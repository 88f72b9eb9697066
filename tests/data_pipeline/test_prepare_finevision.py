"""Parquet files in FineVision's schema become shards; faulty rows are named, wrong files not."""

import json
import subprocess
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_pipeline.chat import ChatSettings
from data_pipeline.errors import InputError
from data_pipeline.index import build_index, load_index
from data_pipeline.prepare.__main__ import main
from data_pipeline.tokenizer import load_tokenizer
from tests.data_pipeline.shards import read_shards
from tests.data_pipeline.small_tokenizers import save_sentencepiece

ROOT = Path(__file__).parents[2]
IMAGES = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
TEXTS = pa.list_(pa.struct([("user", pa.string()), ("assistant", pa.string())]))
SCHEMA = pa.schema(
    [
        ("images", IMAGES),
        ("texts", TEXTS),
        ("source", pa.string()),
        ("relevance_ratings", pa.list_(pa.int64())),
        ("relevance_min", pa.int64()),
    ]
)


def picture(color: str = "red", format: str = "PNG") -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (8, 6), color).save(buffer, format)
    return buffer.getvalue()


def image(data: bytes | None = None, path: str | None = None) -> dict[str, Any]:
    return {"bytes": picture() if data is None else data, "path": path}


def turns(*texts: str | None) -> list[dict[str, Any]]:
    return [
        {"user": user, "assistant": answer}
        for user, answer in zip(texts[::2], texts[1::2], strict=True)
    ]


def row(**changes: Any) -> dict[str, Any]:
    good = {"images": [image()], "texts": turns("What?", "Red."), "source": "ours"}
    return {**good, "relevance_ratings": [4], "relevance_min": 4, **changes}


def write(
    path: Path, rows: list[dict[str, Any]], schema: pa.Schema = SCHEMA, **options: Any
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), path, **options)
    return path


def prepare(source: Path, *options: str) -> Path:
    out = source.parent / "out"
    main(["--format", "finevision", str(source), *options, str(out)])
    return out


def report_of(out: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((out / "prepare.json").read_text())
    return report


def test_images_come_first_and_turns_follow(tmp_path: Path) -> None:
    first, second = picture("blue", "JPEG"), picture("green", "WEBP")
    texts = turns("\nWhat changed?", "The color: <image>", "Sure?", "é 🙂")
    rows = [row(images=[image(first, "a/b.png"), image(second)], texts=texts)]
    out = prepare(write(tmp_path / "train.parquet", rows))
    [sample] = read_shards(out)
    assert sample["__key__"] == "train_00000000"
    assert (sample["0.jpg"], sample["1.webp"]) == (first, second)
    ratings = {"relevance_ratings": [4], "relevance_min": 4}
    assert sample["json"]["metadata"] == {"source": "ours", **ratings, "entry": 0}
    assert sample["json"]["messages"] == [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": "0.jpg"},
                {"type": "image", "image": "1.webp"},
                {"type": "text", "text": "\nWhat changed?"},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "The color: <image>"}]},
        {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "é 🙂"}]},
    ]


@pytest.mark.parametrize("images", [None, []])
def test_a_row_without_images_is_text(tmp_path: Path, images: list | None) -> None:
    [sample] = read_shards(
        prepare(write(tmp_path / "t.parquet", [row(images=images, source=None)]))
    )
    assert {name for name in sample if not name.startswith("__")} == {"json"}
    assert "source" not in sample["json"]["metadata"]


def test_an_image_needs_no_question(tmp_path: Path) -> None:
    [sample] = read_shards(prepare(write(tmp_path / "t.parquet", [row(texts=turns("", "Red."))])))
    [part] = sample["json"]["messages"][0]["content"]
    assert part == {"type": "image", "image": "0.png"}


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no texts": ({"texts": []}, "'texts' is empty"),
    "texts is null": ({"texts": None}, "'texts' is null"),
    "turn is null": ({"texts": [*turns("a", "b"), None]}, "turn 1 of 2 is null"),
    "no question": ({"images": [], "texts": turns("", "b")}, "turn 0 has no user text"),
    "user is null": ({"texts": turns("a", "b", None, "c")}, "turn 2 has no user text"),
    "assistant is null": ({"texts": turns("a", None)}, "turn 1 is an empty answer"),
    "answer is blank": ({"texts": turns("a", " \n")}, "turn 1 is an empty answer"),
    "image is null": ({"images": [None]}, "picture 0 of 1 is empty"),
    "no such path": ({"images": [image(), {"bytes": None, "path": "x.png"}]}, "x.png cannot be"),
    "empty bytes": ({"images": [image(b"")]}, "an object with ['bytes', 'path']"),
    "a claim": ({"texts": turns("<image> or <image>?", "b")}, "2 <image> in the text for 1"),
    "a claim without": (
        {"images": [], "texts": turns("<image>", "b")},
        "1 <image> in the text for 0",
    ),
    "no image": ({"images": [image(b"no picture")]}, "image 0: not an image"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_row_is_skipped_and_named(
    fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, reason = FAULTS[fault]
    out = prepare(write(tmp_path / "t.parquet", [row(), row(**changes), row()]))
    keys = [sample["__key__"] for sample in read_shards(out)]
    assert keys == ["t_00000000", "t_00000002"]
    [skipped] = report_of(out)["skipped"]
    assert skipped["sample"] == "t.parquet, row 1"
    assert reason in skipped["reason"]
    assert "1 faulty samples skipped" in capsys.readouterr().out


def test_text_that_is_not_utf_8_is_a_faulty_row(tmp_path: Path) -> None:
    path = write(
        tmp_path / "t.parquet", [row(texts=turns("a", "xyzxyz")), row()], compression="none"
    )
    data = path.read_bytes()
    assert data.count(b"xyzxyz") >= 1
    path.write_bytes(data.replace(b"xyzxyz", b"xyz\xff\xfez"))
    out = prepare(path)
    [skipped] = report_of(out)["skipped"]
    assert skipped["sample"] == "t.parquet, row 0" and "not UTF-8" in skipped["reason"]


def test_a_folder_of_files_is_read_a_few_rows_at_a_time(tmp_path: Path) -> None:
    source = tmp_path / "data"
    write(
        source / "b" / "train-0.parquet",
        [row(source=f"b{i}") for i in range(70)],
        row_group_size=50,
    )
    write(source / ("a" * 80) / "train-0.parquet", [row(source="a"), row(texts=[])])
    (source / "README.md").write_text("not parquet")
    out = prepare(source)
    samples = read_shards(out)
    assert [s["json"]["metadata"]["source"] for s in samples] == [
        "a",
        *(f"b{i}" for i in range(70)),
    ]
    assert samples[0]["__key__"] == "a" * 46 + "_train-0_00000000"
    assert samples[-1]["__key__"] == "b_train-0_00000069"
    report = report_of(out)
    assert (report["format"], report["files"], report["samples"]) == ("finevision", 2, 71)
    assert report["skipped"][0]["sample"] == "a" * 80 + "/train-0.parquet, row 1"


def test_rows_of_low_relevance_are_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ratings = [1, 4, None, 3, 5, 2]
    path = write(tmp_path / "t.parquet", [row(relevance_min=n, source=str(n)) for n in ratings])
    out = prepare(path, "--min-relevance", "4")
    sources = [sample["json"]["metadata"]["source"] for sample in read_shards(out)]
    assert sources == ["4", "None", "5"]
    report = report_of(out)
    assert (report["left_out"], report["skipped"]) == ({"--min-relevance 4": 3}, [])
    assert report["min_relevance"] == 4
    assert "3 samples left out by --min-relevance 4" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"no usable sample .*\b3 .*--min-relevance 9"):
        rows = [row(relevance_min=n) for n in (1, 2, 3)]
        prepare(write(tmp_path / "low" / "t.parquet", rows), "--min-relevance", "9")


@pytest.mark.parametrize(
    ("schema", "row"),
    [
        (pa.schema([("texts", TEXTS)]), {"texts": turns("a", "b")}),
        (
            pa.schema([("images", pa.list_(pa.binary())), ("texts", TEXTS)]),
            {"images": [picture()], "texts": turns("a", "b")},
        ),
        (
            pa.schema([("image", pa.struct([("bytes", pa.binary())])), ("caption", pa.string())]),
            {"image": {"bytes": picture()}, "caption": "Red."},
        ),
        (
            pa.schema([("image", pa.binary()), ("question", pa.string()), ("answer", pa.int64())]),
            {"image": picture(), "question": "How many?", "answer": 3},
        ),
    ],
)
def test_other_columns_beside_those_of_finevision(
    schema: pa.Schema, row: dict[str, Any], tmp_path: Path
) -> None:
    """A part without images, bare bytes, captions, questions: each file is read by its content."""
    source = tmp_path / "data"
    write(source / "a.parquet", [globals()["row"]()])
    pq.write_table(pa.Table.from_pylist([row], schema), source / "b.parquet")
    samples = read_shards(prepare(source))
    assert [sample["__key__"] for sample in samples] == ["a_00000000", "b_00000000"]
    pictures = ["0.png" in sample for sample in samples]
    assert pictures == [True, "images" in row or "image" in row]


def test_columns_that_say_nothing_are_named(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"picture": [picture()], "label": [3]}), path)
    with pytest.raises(InputError, match="the keys 'picture', 'label', expected one of messages"):
        prepare(path)
    [sample] = read_shards(prepare(path, "--map", "question=label,answer=label"))
    assert sample["json"]["messages"][1]["content"] == [{"type": "text", "text": "3"}]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def damage_a_page(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[4:300] = bytes(296)
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [truncate, damage_a_page])
def test_a_damaged_file_is_named_and_leaves_nothing(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    source = tmp_path / "data"
    write(source / "a.parquet", [row()])
    damage(write(source / "b.parquet", [row() for _ in range(40)]))
    with pytest.raises(InputError, match=r"b\.parquet cannot be read as parquet .*fetch it again"):
        prepare(source, "--strict")
    assert {path.name for path in tmp_path.iterdir()} == {"data"}
    out = prepare(source)
    assert [sample["__key__"] for sample in read_shards(out)] == ["a_00000000"]
    (skipped,) = report_of(out)["skipped"]
    assert skipped["sample"].startswith("b.parquet") and "fetch it again" in skipped["reason"]


def test_no_such_source(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="missing is not a file or folder that exists"):
        prepare(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty holds nothing that is read: no .*\.parquet"):
        prepare(tmp_path / "empty")
    with pytest.raises(InputError, match="--min-relevance is for --format records, not grid"):
        main(["--format", "grid", str(tmp_path / "out"), "--min-relevance", "3"])


def test_without_pyarrow_the_error_says_what_to_install(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", [row()])
    arguments = ["--format", "finevision", str(path), str(tmp_path / "out")]
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from data_pipeline.cli import run_cli\n"
        "from data_pipeline.prepare.__main__ import main\n"
        f"run_cli(lambda: main({arguments!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "pip install pyarrow" in done.stderr


def test_the_shards_can_be_indexed(tmp_path: Path) -> None:
    out = prepare(write(tmp_path / "t.parquet", [row(images=[image(), image()]) for _ in range(3)]))
    tokenizer, chat = load_tokenizer(save_sentencepiece(tmp_path)), ChatSettings()
    build_index(str(out), tokenizer, chat)
    index = load_index(str(out), tokenizer, chat)
    assert len(index) == 3
    assert index.image_width.tolist() == [8] * 6
