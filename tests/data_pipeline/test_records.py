"""Records as people have them: the same messages from every form, nothing lost or invented."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.chat import check_sample
from data_pipeline.errors import InputError
from data_pipeline.media_claims import find_claim
from data_pipeline.prepare.record_files import read_entries
from data_pipeline.records import parse_record, record_kind

Turn = dict[str, Any]


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def image(number: int) -> dict[str, str]:
    return {"type": "image", "image": str(number)}


def turn(role: str, *parts: Any) -> Turn:
    return {"role": role, "content": list(parts)}


def said(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": v} for i, v in enumerate(values)]


ASKED = [turn("user", image(0), text("What?")), turn("assistant", text("Red."))]
ALIKE: dict[str, dict[str, Any]] = {
    "LLaVA": {"image": "a.png", "conversations": said("<image>What?", "Red.")},
    "LLaVA without a placeholder": {"image": "a.png", "conversations": said("What?", "Red.")},
    "VILA": {"images": ["a.png"], "conversations": said("<image>What?", "Red.")},
    "a path under another key": {"image_path": "a.png", "conversations": said("What?", "Red.")},
    "the key in capitals": {"Image": "a.png", "conversations": said("What?", "Red.")},
    "ms-swift": {
        "images": ["a.png"],
        "messages": [
            {"role": "user", "content": "<image>What?"},
            {"role": "assistant", "content": "Red."},
        ],
    },
    "ms-swift's objects": {
        "images": [{"bytes": None, "path": "a.png"}],
        "messages": [
            {"role": "user", "content": "What?"},
            {"role": "assistant", "content": "Red.", "loss": True},
        ],
    },
    "query and response": {"query": "<image>What?", "response": "Red.", "images": ["a.png"]},
    "TRL": {
        "images": ["a.png"],
        "messages": [
            {"role": "user", "content": [{"type": "image"}, text("What?")]},
            {"role": "assistant", "content": [text("Red.")]},
        ],
    },
    "TRL, prompt and completion": {
        "images": ["a.png"],
        "prompt": [{"role": "user", "content": [{"type": "image"}, text("What?")]}],
        "completion": [{"role": "assistant", "content": "Red."}],
    },
    "columns of a parquet": {
        "images": ["a.png"],
        "messages": [
            {"role": "user", "content": [{"type": "image", "text": None}, text("What?")]},
            {"role": "assistant", "content": [{"type": "text", "text": "Red.", "index": None}]},
        ],
    },
    "OpenAI": {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": "a.png"}}, text("What?")],
            },
            {"role": "assistant", "content": "Red."},
        ]
    },
    "typed content as text": {
        "messages": [
            {"role": "user", "content": json.dumps([{"type": "image"}, text("What?")])},
            {"role": "assistant", "content": repr([text("Red.")]), "weight": "1.0"},
        ],
        "train": "train",
        "image": "a.png",
    },
    "Qwen-VL": {
        "messages": [
            {"role": "user", "content": [{"image": "a.png"}, {"text": "What?"}]},
            {"role": "assistant", "content": [{"text": "Red."}]},
        ]
    },
    "Anthropic": {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image", "source": {"data": "a.png"}}, text("What?")],
            },
            {"role": "assistant", "content": "Red."},
        ]
    },
    "a list printed into a cell": {
        "images": "['a.png']",
        "conversations": repr(said("<image>What?", "Red.")),
    },
    "questions and answers": {"image": "a.png", "questions": ["What?"], "answers": ["Red."]},
    "a picture inside a turn": {
        "conversations": [{**said("<image>What?")[0], "image": "a.png"}, said("", "Red.")[1]]
    },
    "pictures in both places": {
        "images": ["a.png"],
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": "a.png"}, text("What?")]},
            {"role": "assistant", "content": "Red."},
        ],
    },
    "FineVision": {"images": ["a.png"], "texts": [{"user": "What?", "assistant": "Red."}]},
    "VQA": {"image": "a.png", "question": "What?", "answer": "Red."},
    "VQAv2": {
        "image": "a.png",
        "question": "What?",
        "answers": [{"answer": "Red."}, {"answer": "Blue."}, {"answer": "Red."}],
    },
    "roles in capitals": {
        "image": "a.png",
        "conversations": [
            {"from": "Human", "value": "What?"},
            {"from": "GPT", "value": "Red.", "weight": 1},
        ],
    },
}


@pytest.mark.parametrize("form", ALIKE)
def test_one_conversation_in_every_form(form: str) -> None:
    record = parse_record(ALIKE[form])
    assert record.messages == ASKED
    assert record.images == ["a.png"]
    check_sample(record.messages)


def test_other_questions() -> None:
    chosen = parse_record({"question": "Which?", "choices": ["a cat", "a dog"], "answer": 1})
    assert chosen.messages == [
        turn("user", text("Which?\nA. a cat\nB. a dog")),
        turn("assistant", text("B")),
    ]
    for answer in ("a dog", "B", "(b)", "1"):
        record = {"question": "Which?", "options": ["a cat", "a dog"], "answer": answer}
        assert parse_record(record).messages == chosen.messages
    asked = {"conversations": said("Which?", "B"), "choices": ["a.png", "b.png"]}
    assert parse_record(asked).metadata == {"choices": ["a.png", "b.png"]}
    lettered = {"question": "Which?", "A": "a cat", "B": "a dog", "C": None, "answer": "B"}
    assert parse_record(lettered).messages == chosen.messages
    own = {"question": "Which?", "options": "['A. a cat', 'B. a dog']", "answer": "B"}
    assert parse_record(own).messages == chosen.messages
    plain = {"question": "[1, 2]", "answer": "[2, 1]"}
    assert parse_record(plain).messages[1] == turn("assistant", text("[2, 1]"))
    most = parse_record({"question": "?", "answers": ["a", "b", "b"]})
    assert most.messages[1] == turn("assistant", text("b"))
    hinted = parse_record({"question": "?", "hint": "H", "answer": "A"}, renamed={"input": "hint"})
    assert hinted.messages[0] == turn("user", text("?\nH"))
    meant = {"question": "?", "answer": "A", "solution": "Because."}
    assert parse_record(meant, renamed={"answer": "answer"}).metadata == {"solution": "Because."}
    alpaca = parse_record({"instruction": "Add.", "input": "1 2", "output": "3", "history": []})
    assert alpaca.messages == [turn("user", text("Add.\n1 2")), turn("assistant", text("3"))]
    caption = parse_record({"file_name": "a.png", "text": " A cat. "})
    assert caption.messages[1] == turn("assistant", text("A cat."))
    assert caption.images == ["a.png"] and caption.metadata == {}


def test_what_has_no_content_is_kept() -> None:
    record = parse_record(
        {
            "id": "图一",
            "source": "ours",
            "score": 0.5,
            "video": None,
            "tools": [],
            "image": float("nan"),
            "metadata": {"detail": "k=1"},
            "conversations": [{**said("Hello")[0], "message_id": 7}, said("", "Hi.")[1]],
        }
    )
    assert record.images == []
    assert record.metadata == {
        "id": "图一",
        "source": "ours",
        "score": 0.5,
        "detail": "k=1",
        "turns": {"0": {"message_id": 7}},
    }


@pytest.mark.parametrize("nothing", [None, "", [], float("nan")])
def test_no_picture_is_text(nothing: Any) -> None:
    record = parse_record({"image": nothing, "conversations": said("Hello", "Hi.")})
    assert record.images == [] and record.messages[0] == turn("user", text("Hello"))


def test_a_system_text_of_its_own() -> None:
    record = {"system": "Be brief.", "conversations": said("Hello", "Hi.")}
    assert parse_record(record).messages[0] == turn("system", text("Be brief."))
    both = [{"from": "system", "value": "Be long."}, *said("Hello", "Hi.")]
    with pytest.raises(InputError, match="'system' and the first turn"):
        parse_record({"system": "Be brief.", "conversations": both})


def test_keys_that_nobody_foresaw() -> None:
    record = {"shot": "a.png", "ask": "What?", "label": "Red.", "depth": b"1", "video": "v.mp4"}
    renamed = {"image": "shot", "question": "ask", "answer": "label"}
    read = parse_record(record, renamed=renamed, ignored=["depth", "video"])
    assert (read.messages, read.images, read.metadata) == (ASKED, ["a.png"], {})
    with pytest.raises(InputError, match=r"'depth', which is or names media .* --ignore depth"):
        parse_record(record, renamed=renamed, ignored=["video"])
    with pytest.raises(InputError, match="--map names 'tag', and the record has 'shot', 'ask'"):
        parse_record(record, renamed={"answer": "tag"})


ANSWER = {"role": "assistant", "content": "A."}
BOX = {"content": "At <bbox>."}


def asked_by(part: Any) -> dict[str, Any]:
    return {"role": "user", "content": [part]}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"image": ["a", "b"], "conversations": said("<image>?", "A.")}, "1 <image> .* for 2 im"),
        ({"conversations": said("<image>?", "A.")}, "1 <image> in the text for 0 images"),
        ({"image": [["a"]], "conversations": said("?", "A.")}, "a list of lists"),
        ({"image": ["a", None], "conversations": said("?", "A.")}, "picture 1 of 2 is empty"),
        ({"video": "v.mp4", "conversations": said("?", "A.")}, "'video', and only pictures"),
        ({"audios": ["v.wav"], "conversations": said("?", "A.")}, "'audios', and only pictures"),
        ({"clip": "v.mp4", "question": "?", "answer": "A."}, "'clip', and only pictures"),
        ({"frame": "v.mp4", "question": "?", "answer": "A."}, "'frame', which is or names media"),
        ({"tools": "[1]", "conversations": said("?", "A.")}, "'tools', which is not read"),
        ({"Context": "A text.", "question": "?", "answer": "A."}, "'Context', which is not read"),
        ({"hint": "Look.", "question": "?", "answer": "A."}, "'hint', which is not read"),
        ({"rejected_response": "B", "messages": said("?", "A.")}, "'rejected_response', which"),
        ({"document": "a.pdf", "question": "?", "answer": "A."}, "'document', which is or names"),
        ({"scan": "a.JFIF", "question": "?", "answer": "A."}, "'scan', which is or names"),
        ({"image_id": 7, "question": "?", "answer": "A."}, "'image_id', .*--map image=image_id"),
        ({"imageURL": "x", "question": "?", "answer": "A."}, "'imageURL', which is or names"),
        (
            {"messages": [{"role": "user", "content": "?", "shot": "a.png"}, ANSWER]},
            "turn 0 has 'shot', which is or names media",
        ),
        ({"messages": [asked_by({"type": "image", "value": "a"}), ANSWER]}, "an image part with"),
        ({"messages": [asked_by({"type": "text", "value": "a"}), ANSWER]}, "a text part with 'ty"),
        (
            {"messages": [asked_by({"type": "text", "text": "?", "loss": False}), ANSWER]},
            "turn 0 has 'loss': False",
        ),
        (
            {"objects": {"bbox": [[1]]}, "messages": [asked_by("Where?"), {**ANSWER, **BOX}]},
            "'objects' for <bbox>",
        ),
        ({"question": "?", "answers": {"text": ["A"]}}, "'answers' is of type dict"),
        ({"question": "?", "answers": ["A", None]}, "'answers' holds an answer that is null"),
        ({"question": ["?", "!"], "answer": ["A"]}, "2 questions and 'answer' 1 answers"),
        ({"question": "?", "answer": 1, "choices": ["1", "2"]}, "choice 1, from 0, or its text"),
        ({"question": "?", "answer": "A", "A": "x", "C": "y"}, "choices A, C: one between"),
        ({"question": "?", "answer": "A", "A": "x", "B": "y", "options": ["x", "z"]}, "both hold"),
        ({"question": "?", "answer": "A", "solution": "B"}, "--map answer=answer which is meant"),
        ({"question": "?", "label": "A"}, "found 'question', 'label'; --map answer=NAME"),
        ({"role": "x", "messages": [{"role": "user", "from": "human"}]}, "both hold the role of"),
        ({"loss": False, "conversations": said("?", "A.")}, "'loss': False, but every"),
        ({"weight": "0.5", "conversations": said("?", "A.")}, "'weight': 0.5, but every"),
        ({"train": "False", "conversations": said("?", "A.")}, "'train': False, but every"),
        ({"weight": 0.5, "conversations": said("?", "A.")}, "'weight': 0.5, but every"),
        ({"rejected": "B.", "question": "?", "answer": "A."}, "'rejected', which is not read"),
        ({"question": "?"}, "there is no answer"),
        ({"question": "?", "answer": "C", "choices": ["a", "b"]}, "'C' is none of the 2 choices"),
        ({"caption": "A cat."}, "the caption of one picture, and there are 0"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "turn 0 has the role 'tool'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "video", "video": "v.mp4"}]}]},
            "a part of type 'video', expected text or image",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "value": "y"}]},
            "'content' and 'value' both hold the content of turn 0",
        ),
        ({"question": "?", "prompt": "!", "answer": "A."}, "'question' and 'prompt' both"),
        ([1], "of type list, expected an object"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(record: Any, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        parse_record(record)


CLAIMS = (
    *("<image>", "<video>", "<Audio>", "<img>a/b.jpg</img>", "<|vision_start|>", "<image_1>"),
    *("<|image_1|>", "<ImageHere>", "[IMG]", "<image_placeholder>", "<image-placeholder>"),
    *("<|image|>", "<start_of_image>", "<|begin_of_image|>", "<im_patch>", "<vila/image>"),
    *("< image >", "<image/>", "<image_soft_token>"),
)
NO_CLAIMS = (
    *("a < b", "[IMAGE]", "<imagery>", "image>", "<image href='a'>", "![a](b.png)", "<im"),
    *("<img></img><IMG_CONTEXT>", "<img src='a.png'>", "<p>x</p>"),
)


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_claim_in_a_question_is_refused_in_an_answer_it_is_text(claim: str) -> None:
    assert find_claim(f"a {claim} b") == claim
    messages = [turn("user", text(f"See {claim}.")), turn("assistant", text("Red."))]
    with pytest.raises(InputError, match="turn 0"):
        check_sample(messages)
    check_sample([turn("user", text("See.")), turn("assistant", text(claim))])


@pytest.mark.parametrize("plain", NO_CLAIMS)
def test_ordinary_text_claims_nothing(plain: str) -> None:
    assert find_claim(plain) is None
    check_sample([turn("user", text(plain)), turn("assistant", text("Red."))])


# Every format gives the same messages.

words = st.text("ab é\n<>[]/", min_size=1, max_size=12).filter(lambda t: t.strip())
stretches = words.filter(lambda t: find_claim(t) is None)


@st.composite
def conversations(draw: st.DrawFn) -> list[Turn]:
    """Questions of texts and pictures, answers of text; no two texts beside each other."""
    turns: list[Turn] = []
    number = 0
    for _ in range(draw(st.integers(1, 3))):
        parts: list[dict[str, str]] = []
        for kind in draw(st.lists(st.sampled_from(["text", "image"]), min_size=1, max_size=4)):
            if kind == "text" and (not parts or parts[-1]["type"] == "image"):
                parts.append(text(draw(stretches)))
            elif kind == "image":
                parts.append(image(number))
                number += 1
        turns += [turn("user", *parts), turn("assistant", text(draw(words)))]
    return turns


FILES = (
    *("list.json", "lines.jsonl", "misnamed.jsonl", "under_ids.json", "lines.jsonl.gz"),
    *("table.parquet", "table.arrow", "table.csv", "table.tsv"),
)


def as_string(parts: list[dict[str, str]]) -> str:
    return "".join("<image>" if part["type"] == "image" else part["text"] for part in parts)


def forms(turns: list[Turn]) -> dict[str, dict[str, Any]]:
    """One conversation as other projects write it; picture number n is in n.png."""
    count = sum(part["type"] == "image" for t in turns for part in t["content"])
    files = [f"{number}.png" for number in range(count)]
    strings = [(t["role"], as_string(t["content"])) for t in turns]
    names = {"user": "human", "assistant": "gpt"}
    named = [
        {
            "role": t["role"],
            "content": [
                {"type": "image", "image": f"{p['image']}.png"} if p["type"] == "image" else p
                for p in t["content"]
            ],
        }
        for t in turns
    ]
    pairs = zip(strings[::2], strings[1::2], strict=True)
    return {
        "llava": {
            "image": files,
            "conversations": [{"from": names[role], "value": value} for role, value in strings],
        },
        "strings": {
            "images": files,
            "messages": [{"role": role, "content": value} for role, value in strings],
        },
        "parts": {"messages": named},
        "pairs": {"images": files, "texts": [{"user": a[1], "assistant": b[1]} for a, b in pairs]},
    }


@settings(deadline=None)
@given(conversations())
def test_every_form_gives_the_same_messages(turns: list[Turn]) -> None:
    for name, record in forms(turns).items():
        read = parse_record(record)
        assert read.messages == turns, name
        shown = [part for t in turns for part in t["content"] if part["type"] == "image"]
        assert read.images == [f"{part['image']}.png" for part in shown], name


@settings(deadline=None, max_examples=25)
@given(st.lists(conversations(), min_size=1, max_size=4))
def test_every_kind_of_file_gives_the_same_records(
    tmp_path_factory: pytest.TempPathFactory, several: list[list[Turn]]
) -> None:
    folder = tmp_path_factory.mktemp("files")
    for name in ("llava", "strings", "pairs"):
        records = [forms(turns)[name] for turns in several]
        numbered = list(enumerate(records))
        (folder / "list.json").write_text(json.dumps(records))
        (folder / "lines.jsonl").write_text("\n".join(map(json.dumps, records)))
        (folder / "misnamed.jsonl").write_text(json.dumps(records, indent=1))
        (folder / "under_ids.json").write_text(json.dumps({f"n{i}": r for i, r in numbered}))
        (folder / "lines.jsonl.gz").write_bytes(
            gzip.compress((folder / "lines.jsonl").read_bytes())
        )
        table = pa.Table.from_pylist(records)
        pq.write_table(table, folder / "table.parquet")
        with pa.ipc.new_stream(str(folder / "table.arrow"), table.schema) as writer:
            writer.write_table(table)
        for suffix, delimiter, as_text in (("csv", ",", json.dumps), ("tsv", "\t", repr)):
            with (folder / f"table.{suffix}").open("w", newline="") as text:
                cells = csv.DictWriter(text, list(records[0]), delimiter=delimiter)
                cells.writeheader()
                cells.writerows({k: as_text(v) for k, v in r.items()} for r in records)
        for file in FILES:
            entries = list(read_entries(folder / file))
            assert [parse_record(e.value).messages for e in entries] == several, (name, file)


def test_csv_and_its_faults(tmp_path: Path) -> None:
    path = tmp_path / "metadata.csv"
    path.write_bytes('file_name,text\na.png,"A, b"\nb.png,é,more\n'.encode("utf-8-sig"))
    first, second = read_entries(path)
    assert first.value == {"file_name": "a.png", "text": "A, b"}
    assert second.fault is not None and "metadata.csv:3" in str(second.fault)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json", "[]".encode("utf-16"), "UTF-16"),
        ("a.json.gz", b"\x1f\x8b", "cannot be read to its end"),
        ("a.zip", b"PK", "unpack it first"),
        ("a.txt", b"[]", "expected one of .json"),
        ("a.json", b'{"a": 1}', "holds one JSON dict"),
        ("a.json", b'[{"a": 1},]', "a.json:1:"),
    ],
)
def test_files_that_are_none(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=expected):
        list(read_entries(tmp_path / name))


def test_what_a_record_is_told_by() -> None:
    assert record_kind({"conversations": [1], "caption": "x"}) == ("turns", "conversations")
    assert record_kind({"question": "x", "text": "y"}) == ("question", "question")
    with pytest.raises(InputError, match="the keys 'a', expected one of messages"):
        record_kind({"a": 1})
