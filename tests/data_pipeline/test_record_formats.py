"""Files of records in the forms people bring: tiny ones of the real schemas, and their faults."""

import base64
import bz2
import csv
import datetime
import gzip
import json
import lzma
import shutil
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_pipeline.errors import InputError
from data_pipeline.prepare.__main__ import main
from data_pipeline.prepare.record_files import read_entries
from data_pipeline.records import parse_record
from tests.data_pipeline.shards import read_shards


def picture(width: int = 8, noisy: bool = False) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (6, width, 3), dtype=np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels if noisy else pixels * 0).save(buffer, "PNG")
    return buffer.getvalue()


def said(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def write_csv(path: Path, rows: list[dict[str, Any]], delimiter: str = ",") -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_arrow(path: Path, table: pa.Table, stream: bool = True) -> None:
    """As datasets writes it: a stream; Feather has a footer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    opened = (pa.ipc.new_stream if stream else pa.ipc.new_file)(str(path), table.schema)
    with opened as writer:
        writer.write_table(table)


def saved_dataset(folder: Path, table: pa.Table, parts: int = 2, **state: Any) -> None:
    names = [f"data-{part:05}-of-{parts:05}.arrow" for part in range(parts)]
    for name in names:
        write_arrow(folder / name, table)
    write_arrow(folder / "cache-1f2e.arrow", table)
    content = {"_data_files": [{"filename": name} for name in names], "_split": None, **state}
    (folder / "state.json").write_text(json.dumps(content))
    (folder / "dataset_info.json").write_text('{"features": {}}')


def texts_of(out: Path) -> list[list[str]]:
    """What is said in each sample, pictures as their members' names."""
    return [
        [
            "".join(part.get("text", f"[{part.get('image')}]") for part in turn["content"])
            for turn in sample["json"]["messages"]
        ]
        for sample in read_shards(out)
    ]


STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def finevision(*images: list[Any], text: str = "What?") -> pa.Table:
    held = [[i and {"bytes": i, "path": None} for i in listed] for listed in images]
    turns = [[{"user": text, "assistant": "Red."}]] * len(images)
    day = [datetime.datetime(2026, 1, 1)] * len(images)
    return pa.table({"images": pa.array(held, pa.list_(STRUCT)), "texts": turns, "day": day})


def test_arrow_as_datasets_saves_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = finevision([picture()], [picture(), picture()])
    expected = [["[0.png]What?", "Red."], ["[0.png][1.png]What?", "Red."]]
    saved_dataset(tmp_path / "saved", table)
    assert main([str(tmp_path / "saved"), str(tmp_path / "out")]) == 0
    assert texts_of(tmp_path / "out") == expected * 2
    printed = capsys.readouterr().out
    assert "2 Arrow files, records of turns" in printed and ".json 2, .arrow 1" in printed
    assert read_shards(tmp_path / "out")[0]["json"]["metadata"]["day"] == "2026-01-01 00:00:00"
    write_arrow(tmp_path / "a.feather", table, stream=False)
    assert main([str(tmp_path / "a.feather"), str(tmp_path / "feather")]) == 0
    assert texts_of(tmp_path / "feather") == expected


def test_arrow_that_is_ambiguous_or_damaged(tmp_path: Path) -> None:
    splits = tmp_path / "splits"
    for split in ("train", "test"):
        saved_dataset(splits / split, finevision([picture()]), parts=1)
    (splits / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(InputError, match="1 Arrow files in test or as 1 Arrow files in train"):
        main([str(splits), str(tmp_path / "out")])
    shutil.rmtree(splits / "test")
    assert main([str(splits), str(tmp_path / "out")]) == 0
    saved_dataset(tmp_path / "chosen", finevision([picture()]), _indices_files=[{"filename": "i"}])
    with pytest.raises(InputError, match=r"a selection of rows .*flatten_indices"):
        main([str(tmp_path / "chosen"), str(tmp_path / "none")])
    (tmp_path / "b.arrow").write_bytes(b"ARROW" * 50)
    [entry] = read_entries(tmp_path / "b.arrow")
    assert "cannot be read as Arrow" in str(entry.fault)


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    columns = [pa.array([text]) for text in ("Q", "other", "A")]
    pq.write_table(
        pa.table(columns, names=["question", "question", "answer"]), tmp_path / "a.parquet"
    )
    [entry] = read_entries(tmp_path / "a.parquet")
    assert "two columns named 'question'" in str(entry.fault)


def test_classes_are_read_by_name(tmp_path: Path) -> None:
    features = {"answer": {"names": ["no", "yes"], "_type": "ClassLabel"}, "question": {}}
    about = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    table = pa.table({"question": ["?"], "answer": [1]}).replace_schema_metadata(about)
    pq.write_table(table, tmp_path / "a.parquet")
    [entry] = read_entries(tmp_path / "a.parquet")
    assert entry.value == {"question": "?", "answer": "yes"}


def test_pictures_padded_with_nulls(tmp_path: Path) -> None:
    table = finevision([picture(), None, None], text="<image>What?")
    pq.write_table(table, tmp_path / "a.parquet")
    assert main([str(tmp_path / "a.parquet"), str(tmp_path / "out")]) == 0
    assert texts_of(tmp_path / "out") == [["[0.png]What?", "Red."]]
    with pytest.raises(InputError, match="picture 1 of 2 is empty"):  # which one was meant?
        parse_record({"images": ["a", None], "texts": [{"user": "?", "assistant": "A"}]})
    with pytest.raises(InputError, match="picture 1 of 2 is empty"):
        parse_record({"images": ["a", None], "conversations": said("<image><image>", "A")})


LINES = [{"conversations": said(f"Question {number}?", "A.")} for number in range(3)]


@pytest.mark.parametrize("packing", ["gz", "bz2", "xz", "zst"])
def test_packed_files(packing: str, tmp_path: Path) -> None:
    pack: Any = {
        "gz": gzip.compress,
        "bz2": bz2.compress,
        "xz": lzma.compress,
        "zst": lambda data: pa.compress(data, "zstd", asbytes=True),
    }[packing]
    lines = "\n".join(map(json.dumps, LINES)).encode()
    for name, data in (
        *((f"a.jsonl.{packing}", lines), (f"a.json.{packing}", json.dumps(LINES).encode())),
        *((f"a.JSONL.{packing.upper()}", lines), ("misnamed.jsonl", lines)),
        (f"a.csv.{packing}", b"question,answer\nQ,A\n" * 1),
    ):
        (tmp_path / name).write_bytes(pack(data))
        found = [entry.value for entry in read_entries(tmp_path / name)]
        assert found == (LINES if ".csv" not in name else [{"question": "Q", "answer": "A"}])
        (tmp_path / name).write_bytes(pack(data)[:-12])
        with pytest.raises(InputError, match="cannot be read to its end"):
            raise next(e.fault for e in read_entries(tmp_path / name) if e.fault)


def test_what_is_read_before_a_packed_file_breaks_off(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).bytes(30_000).hex()
    lines = [json.dumps({"question": f"Q{i}", "answer": noise[i * 100 :][:99]}) for i in range(600)]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode())[:-20_000])
    entries = list(read_entries(tmp_path / "a.jsonl.gz"))
    assert 50 < len(entries) < 500 and not any(entry.fault for entry in entries[:-1])
    assert "all behind it" in entries[-1].where and "Is it complete" in str(entries[-1].fault)


JSON_FORMS: dict[str, tuple[Any, list[list[str]]]] = {
    "ScienceQA, an entry under each id": (
        {
            "7": {"question": "Which?", "choices": ["x", "y"], "answer": 1, "hint": ""},
            "8": {"question": "Who?", "choices": ["x", "y"], "answer": 0, "image": "a.png"},
        },
        [["Which?\nA. x\nB. y", "B"], ["[0.png]Who?\nA. x\nB. y", "A"]],
    ),
    "COCO's captions": (
        {
            "info": {"year": 2014},
            "licenses": [{"id": 1}],
            "images": [{"id": 5, "file_name": "a.png", "width": 8}, {"id": 6, "file_name": "-"}],
            "annotations": [
                {"image_id": 5, "id": 11, "caption": "A cat. "},
                {"image_id": 5, "id": 12, "caption": "A dog."},
            ],
        },
        [["[0.png]Describe the image.", "A cat."], ["[0.png]Describe the image.", "A dog."]],
    ),
    "VQA's questions with their annotations": (
        {
            "questions": [{"question_id": 1, "image": "a.png", "question": "What?"}],
            "annotations": [{"question_id": 1, "answers": [{"answer": "red"}] * 10}],
        },
        [["[0.png]What?", "red"]],
    ),
    "DocVQA": (
        {
            "dataset_name": "docvqa",
            "data": [{"questionId": 1, "question": "What?", "image": "a.png", "answers": ["x"]}],
        },
        [["[0.png]What?", "x"]],
    ),
    "TextCaps": (
        {"data": [{"image_id": "a", "image_path": "a.png", "caption_str": "A sign."}]},
        [["[0.png]Describe the image.", "A sign."]],
    ),
    "one record": ({"id": "a", "conversations": said("Q", "A")}, [["Q", "A"]]),
    "OCR-VQA, with pictures named": (
        {"k": {"image": "a.png", "questions": ["Who?", "When?"], "answers": ["B", "1990"]}},
        [["[0.png]Who?", "B", "When?", "1990"]],
    ),
}


@pytest.mark.parametrize("form", JSON_FORMS)
def test_json_in_other_forms(form: str, tmp_path: Path) -> None:
    content, expected = JSON_FORMS[form]
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "data.json").write_text(json.dumps(content))
    assert main([str(tmp_path / "data.json"), str(tmp_path / "out")]) == 0
    assert texts_of(tmp_path / "out") == expected
    if form.startswith("ScienceQA"):
        assert [sample["__key__"] for sample in read_shards(tmp_path / "out")] == ["7", "8"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"questions": [{"question": "?", "question_id": 1}]}, "VQA's questions without the other"),
        ({"annotations": [{"answers": [], "question_id": 1}]}, "VQA's annotations without the oth"),
        ({"question": {"0": "?"}, "answer": {"0": "A"}}, "columns, .*orient='records'"),
        ({"question": ["?"], "answer": ["A"]}, "columns, .*orient='records'"),
        ({"train": [{"a": 1}], "test": [{"a": 1}]}, "one JSON dict with the keys 'train', 'test'"),
        ({"a": {"annotation": "a.json", "root": ""}}, "a list of datasets.*--format mixture"),
        ("text", "one JSON str"),
    ],
)
def test_json_that_is_no_list(content: Any, expected: str, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=expected):
        list(read_entries(tmp_path / "data.json"))


def test_a_table_with_pictures_in_base64(tmp_path: Path) -> None:
    """As VLMEvalKit has its questions; a field may be longer than csv's own limit."""
    large = base64.b64encode(picture(9000, noisy=True)).decode()
    assert len(large) > 131_072
    usual = {"index": 0, "question": "Which?", "hint": "", "C": "", "D": ""}
    rows = [
        {**usual, "image": large, "A": "x", "B": "y", "answer": "B"},
        {**usual, "image": base64.b64encode(picture()).decode(), "A": "", "B": "", "answer": 0.5},
    ]
    path = write_csv(tmp_path / "data.tsv", rows, "\t")
    assert main([str(path), str(tmp_path / "out")]) == 0
    assert texts_of(tmp_path / "out") == [
        ["[0.png]Which?\nA. x\nB. y", "B"],
        ["[0.png]Which?", "0.5"],
    ]


def test_rows_of_csv_are_read_or_named_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_bytes(b'question;answer\nA,b;1\n"A" b;2\n\xe9;3\nlast;4\n')
    entries = list(read_entries(path))
    assert [entry.value and entry.value["answer"] for entry in entries] == ["1", None, None, "4"]
    assert "data.csv:3" in str(entries[1].fault) and "UTF-8" in str(entries[2].fault)
    path.write_text("question,answer,question\nQ,A,other\n")
    with pytest.raises(InputError, match="two columns named 'question'"):
        list(read_entries(path))
    path.write_bytes("question\tanswer\n".encode("utf-16"))
    with pytest.raises(InputError, match="UTF-16"):
        list(read_entries(path))


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.jsonl"])
def test_a_pointer_of_git_lfs(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\nsize 12\n")
    with pytest.raises(InputError, match="git lfs pull"):
        list(read_entries(tmp_path / name))


def test_a_picture_beside_those_that_are_shown(tmp_path: Path) -> None:
    """Another one is not lost without a word; another name for the same one is metadata."""
    (tmp_path / "a.png").write_bytes(picture())
    records = [
        {"id": other, "image": "./a.png", "image_name": other, "question": "?", "answer": "A"}
        for other in ("b.png", "x/a.png", "a.png", "a")
    ]
    (tmp_path / "data.json").write_text(json.dumps(records))
    assert main([str(tmp_path / "data.json"), str(tmp_path / "out")]) == 1
    assert len(read_shards(tmp_path / "out")) == 3
    [skipped] = json.loads((tmp_path / "out" / "prepare.json").read_text())["skipped"]
    assert "b.png" in skipped["sample"] and "'image_name', which names a pict" in skipped["reason"]


def test_parts_of_one_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that cannot be read is a fault among others, wherever it stands."""
    source = tmp_path / "source"
    source.mkdir()
    for number, line in enumerate(LINES):
        (source / f"part-{number}.json").write_text(json.dumps([line]))
    (source / "part-00.json").write_text("[broken")
    (source / "README.md").write_text("What it is.")
    status = main([str(source), str(tmp_path / "out"), "--max-bad-fraction", ".3"])
    assert status == 0 and len(read_shards(tmp_path / "out")) == 3
    printed = capsys.readouterr()
    assert "part-0.json and 3 like it, records of turns (under 'conversations')" in printed.out
    assert "1 of 4 files looked at hold others, as" in printed.out
    assert "skipped part-00.json, the file" in printed.err
    (source / "other.json").write_text(json.dumps(LINES))
    with pytest.raises(InputError, match=r"part-0.json and 3 like it|other\.json"):
        main([str(source), str(tmp_path / "none")])


def test_an_odd_first_file_does_not_tell_for_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pq.write_table(pa.table({"a": [1]}), tmp_path / "0.parquet")
    usual = pa.table({"question": ["?"], "answer": ["A"]})
    for number in (1, 2):
        pq.write_table(usual, tmp_path / f"{number}.parquet")
    assert main([str(tmp_path), str(tmp_path / "out")]) == 1
    printed = capsys.readouterr()
    assert "3 parquet files, records of question (under 'question')" in printed.out
    assert "as " + str(tmp_path / "0.parquet") in printed.out
    assert "skipped 0.parquet, row 0" in printed.err
