"""Shards made from people's files: complete, faithful, or not there at all."""

import itertools
import json
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import webdataset
from PIL import Image

from data_pipeline.errors import InputError
from data_pipeline.prepare.__main__ import main
from data_pipeline.prepare.demo_corpus import prepare_demo
from data_pipeline.prepare.shard_writer import SampleWriter, ShardLimits
from tests.data_pipeline.shards import read_shards

ROOT = Path(__file__).parents[2]


def save_image(path: Path, color: str = "red", **options: object) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), color).save(path, **options)
    return path.read_bytes()


def conversation(*values: str) -> list[dict[str, str]]:
    return [
        {"from": speaker, "value": value}
        for speaker, value in zip(itertools.cycle(("human", "gpt")), values, strict=False)
    ]


def entry(**changes: Any) -> dict[str, Any]:
    good = {"id": "a", "image": "a.png", "conversations": conversation("<image>\nWhat?", "Red.")}
    return {**good, **changes}


def report_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "prepare.json").read_text())


@pytest.fixture
def llava(tmp_path: Path):
    """Writes entries to a file, converts it, and returns the output folder."""
    save_image(tmp_path / "images/a.png")

    def run(entries: Any, *options: str, name: str = "source.json") -> Path:
        source, out = tmp_path / name, tmp_path / "out"
        if isinstance(entries, str):
            source.write_text(entries)
        else:
            source.write_text(json.dumps(entries))
        images = str(tmp_path / "images")
        main(["--format", "llava", str(source), "--images", images, *options, str(out)])
        return out

    return run


def test_llava_text_and_images_in_order(llava: Any, tmp_path: Path) -> None:
    first = save_image(tmp_path / "images/deep/one.JPG", "blue", quality=50)
    second = save_image(tmp_path / "images/two.png", "green")
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "From <image> to\n<image>: what changed?"},
        {"from": "gpt", "value": "The color."},
        {"from": "human", "value": "<image>"},
        {"from": "gpt", "value": "é 🙂"},
    ]
    images = ["deep/one.JPG", "two.png", "deep/one.JPG"]
    out = llava([entry(id="x/y.z", image=images, conversations=turns)])
    [sample] = read_shards(out)
    assert "." not in sample["__key__"] and "/" not in sample["__key__"]
    assert sample["json"]["messages"] == [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "From "},
                {"type": "image", "image": "0.jpg"},
                {"type": "text", "text": " to\n"},
                {"type": "image", "image": "1.png"},
                {"type": "text", "text": ": what changed?"},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "The color."}]},
        {"role": "user", "content": [{"type": "image", "image": "2.jpg"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "é 🙂"}]},
    ]
    assert (sample["0.jpg"], sample["1.png"], sample["2.jpg"]) == (first, second, first)
    assert {name for name in sample if not name.startswith("__")} == {
        *("json", "0.jpg", "1.png", "2.jpg")
    }


def test_llava_text_only(llava: Any) -> None:
    turns = conversation("Hello", "Hi.", "Bye", "See you.")
    [sample] = read_shards(llava([{"id": 7, "conversations": turns}]))
    assert sample["__key__"] == "7"
    assert [turn["role"] for turn in sample["json"]["messages"]] == ["user", "assistant"] * 2
    assert {name for name in sample if not name.startswith("__")} == {"json"}


IMAGE = {"type": "image", "image": "a.png"}
FAULTS: dict[str, tuple[Any, str]] = {
    "missing file": (entry(image="b.png"), "cannot be read"),
    "no image": (entry(image="broken.png"), "not an image"),
    "placeholder without image": ({**entry(), "image": None}, "1 <image> in the text for 0"),
    "a picture in both": (
        entry(conversations=[{"from": "human", "value": "<image>", "image": "b.png"}]),
        "0 <image> in the text for 1 images, beside 1",
    ),
    "one placeholder for two": (entry(image=["a.png", "a.png"]), "1 <image> in the text for 2"),
    "wrong role": (
        entry(conversations=[{"from": "alien", "value": "<image>"}]),
        "'alien', expected one of user, human, assistant, gpt",
    ),
    "unhashable role": (entry(conversations=[{"from": [], "value": "<image>"}]), "expected one of"),
    "no answer": (entry(conversations=conversation("<image>")), "last turn is not the assistant's"),
    "gpt begins": (entry(image=None, conversations=conversation("What?")[::-1]), "last turn"),
    "only gpt": (entry(conversations=[{"from": "gpt", "value": "<image>"}]), "no user turn"),
    "image in answer": (
        entry(conversations=[conversation("<image>")[0], {"from": "gpt", "value": [IMAGE]}]),
        "turn 1 is the assistant's and has an image",
    ),
    "empty answer": (entry(conversations=conversation("<image>", " \n")), "turn 1 is an empty ans"),
    "empty question": (entry(image=None, conversations=conversation("", "Red.")), "no user text"),
    "video": (entry(video="v.mp4"), "'video', and only pictures are read"),
    "tools": (entry(tools=[{"name": "ocr"}]), "'tools', which is not read"),
    "weight": (entry(weight=0), "'weight': 0, but every"),
    "loss of a turn": (
        entry(conversations=[conversation("<image>")[0], {"from": "gpt", "value": "a", "loss": 0}]),
        "turn 1 has 'loss': 0",
    ),
    "claim": (entry(conversations=conversation("<image> <video>", "A.")), "media by '<video>'"),
    "URL": (entry(image="https://host/a.png"), "is a URL; download it"),
    "two readings": (entry(question="What?"), "'conversations' and 'question' both"),
    "unread picture": (
        {"id": "b", "shot": "b.png", "conversations": conversation("What?", "Red.")},
        "'shot', which is or names media that no turn shows",
    ),
    "path upwards": (entry(image="../other/a.png"), "leads out of the image folder"),
    "path upwards inside": (entry(image="x/../../a.png"), "leads out of the image folder"),
    "absolute path": (entry(image="/etc/hostname"), "leads out of the image folder"),
    "folder": (entry(image="."), "cannot be read"),
    "zero byte": (entry(image="a\0.png"), "cannot be read"),
    "image is a number": (entry(image=3), "expected a file name, a URL or bytes"),
    "no conversation": (entry(conversations=[]), "'conversations' is empty"),
    "turns are no list": (entry(conversations="hello"), "expected a list of turns"),
    "value is a number": (entry(conversations=[{"from": "human", "value": 1}]), "expected a text"),
    "not an object": ("hello", "of type str, expected an object"),
    "lone surrogate": (entry(conversations=conversation("<image>", "\ud800")), "not valid Unicode"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_sample_is_skipped_and_named(
    fault: str, llava: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faulty, reason = FAULTS[fault]
    (tmp_path / "images/broken.png").write_text("no picture")
    out = llava([entry(id="before"), faulty, entry(id="after")])
    assert [sample["__key__"] for sample in read_shards(out)] == ["before", "after"]
    report = report_of(out)
    assert (report["samples"], report["images"]) == (2, 2)
    [skipped] = report["skipped"]
    assert skipped["sample"].startswith("entry 1")
    assert reason in skipped["reason"]
    printed = capsys.readouterr()
    assert reason in printed.err
    assert "1 faulty samples skipped" in printed.out


def test_link_inside_the_image_folder_may_lead_elsewhere(llava: Any, tmp_path: Path) -> None:
    data = save_image(tmp_path / "elsewhere/b.png", "blue")
    (tmp_path / "images/linked").symlink_to(tmp_path / "elsewhere")
    [sample] = read_shards(llava([entry(image="linked/b.png")]))
    assert sample["0.png"] == data


def test_keys_are_unique_and_clean(llava: Any) -> None:
    ids = ["a", "a-1", "a", "a.b", "a/b", "", None, "__x__", "ä" * 300, "a" * 300, "a" * 300]
    out = llava([entry(id=name) for name in ids], "--samples-per-shard", "4")
    keys = [sample["__key__"] for sample in read_shards(out)]
    assert len(set(keys)) == len(keys) == len(ids)
    assert keys[:3] == ["a", "a-1", "a-2"]
    assert all(re.fullmatch("[A-Za-z0-9-][A-Za-z0-9_-]*", key) for key in keys)
    assert max(map(len, keys)) < 80  # a plain tar header has room for 100 with the suffix
    assert [len(read_tar(path)) for path in sorted(out.glob("*.tar"))] == [8, 8, 6]


def read_tar(path: Path) -> list[str]:
    with tarfile.open(path) as tar:
        return tar.getnames()


def test_shards_are_limited_in_bytes(tmp_path: Path) -> None:
    with SampleWriter(tmp_path / "50% done", ShardLimits(num_bytes=1500)) as writer:
        for number in range(5):
            writer.write(str(number), [], {"0.png": bytes(900)})
    shards = sorted((tmp_path / "50% done").iterdir())
    assert [path.name for path in shards] == ["000000.tar", "000001.tar", "000002.tar"]
    assert [len(read_tar(path)) for path in shards] == [4, 4, 2]


def test_shards_are_those_of_webdataset_with_whole_numbers_as_time(tmp_path: Path) -> None:
    """Byte by byte, over a shard's end; webdataset's own time of 0.0 would add blocks."""
    samples = [
        ({"1.jpg": bytes(range(200)) * size, "0.png": b"x" * (512 * size)}, [{"role": f"{size}"}])
        for size in (1, 40, 7)
    ]
    with SampleWriter(tmp_path / "ours", ShardLimits(samples=2)) as writer:
        for number, (images, turns) in enumerate(samples):
            writer.write(f"s{number}", turns, images)
    (tmp_path / "theirs").mkdir()
    pattern = str(tmp_path / "theirs/%06d.tar")
    options: dict[str, Any] = {"verbose": 0, "encoder": False, "user": "", "group": "", "mtime": 0}
    with webdataset.ShardWriter(pattern, maxcount=2, **options) as shards:
        for number, (images, turns) in enumerate(samples):
            text = json.dumps({"messages": turns}).encode()
            shards.write({"__key__": f"s{number}", **images, "json": text})
    for name in ("000000.tar", "000001.tar"):
        ours, theirs = (tmp_path / whose / name for whose in ("ours", "theirs"))
        assert ours.read_bytes() == theirs.read_bytes(), name


def test_a_list_is_read_once_and_without_torch(tmp_path: Path) -> None:
    """Both cost seconds that nobody would notice otherwise."""
    save_image(tmp_path / "a.png")
    (tmp_path / "list.json").write_text(json.dumps([entry(), entry(id="b")]))
    code = (
        "import json, sys; from data_pipeline.prepare.__main__ import main\n"
        "parsed = []; loads = json.loads\n"
        "json.loads = lambda text, **how: parsed.append(loads(text, **how)) or parsed[-1]\n"
        "main([sys.argv[1] + '/list.json', sys.argv[1] + '/out', '--format', 'records'])\n"
        "assert sum(isinstance(content, list) for content in parsed) == 1, parsed\n"
        "assert not {'torch', 'transformers', 'webdataset'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=ROOT)
    assert len(read_shards(tmp_path / "out")) == 2


def test_jsonl(llava: Any) -> None:
    lines = [json.dumps(entry(id=name)) for name in "xyz"]
    out = llava("\n\n".join(lines) + "\n", name="source.jsonl")
    assert [sample["__key__"] for sample in read_shards(out)] == ["x", "y", "z"]


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ('[{"id": "a"},\n {"id"', "source.json", r"source\.json:2:7: not JSON"),
        ('{"id": "a"}', "source.json", r"source\.json:1:1: .*dict.* list"),
        ("[" * 100_000, "source.json", "not JSON"),
        ('{"id": "a"}\n{"id', "source.jsonl", "no usable sample in .*: 2 skipped"),
        ("[]", "source.json", "no usable sample in .*: 0 skipped"),
        ("[1]", "source.json", "no usable sample .*1 skipped.*entry 0.* int"),
    ],
)
def test_unusable_source(text: str, name: str, expected: str, llava: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=expected):
        llava(text, name=name)
    assert not (tmp_path / "out").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"images", name}


def test_a_broken_line_is_skipped_and_named(llava: Any, tmp_path: Path) -> None:
    lines = [json.dumps(entry(id=str(number))) for number in range(20)]
    out = llava("\n".join([*lines[:7], "{", *lines[7:]]), name="source.jsonl")
    assert len(read_shards(out)) == 20
    (skipped,) = report_of(out)["skipped"]
    assert skipped["sample"] == "entry 7" and "source.jsonl:8:1: not JSON" in skipped["reason"]


def test_where_strict_a_broken_line_leaves_nothing(llava: Any, tmp_path: Path) -> None:
    lines = [json.dumps(entry(id=str(number))) for number in range(20)]
    with pytest.raises(InputError, match=r"source\.jsonl:21:2: not JSON"):
        llava("\n".join(lines) + "\n{", "--strict", name="source.jsonl")
    assert {path.name for path in tmp_path.iterdir()} == {"images", "source.jsonl"}


def test_folder(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    first = save_image(source / "one.jpeg")
    second = save_image(source / "deep/one.png", "blue")
    save_image(source / "bare.png")
    save_image(source / "empty.png")
    (source / "one.txt").write_text("A red\nsurface.\n", encoding="utf-8")
    (source / "deep/one.json").write_text('{"caption": "A blue surface."}')
    (source / "empty.txt").write_text(" \n")
    (source / "notes.md").write_text("not an image")
    main(["--format", "folder", str(source), str(out)])
    samples = {sample["__key__"]: sample for sample in read_shards(out)}
    assert set(samples) == {"one", "deep_one"}
    assert samples["one"]["0.jpeg"] == first
    assert samples["deep_one"]["0.png"] == second
    assert samples["one"]["json"]["messages"] == [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": "0.jpeg"},
                {"type": "text", "text": "Describe the image."},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "A red\nsurface."}]},
    ]
    answer = samples["deep_one"]["json"]["messages"][1]["content"][0]["text"]
    assert answer == "A blue surface."
    reasons = {Path(skip["sample"]).name: skip["reason"] for skip in report_of(out)["skipped"]}
    assert reasons["bare.png"].startswith("no caption: neither bare.txt nor bare.json")
    assert reasons["empty.png"].endswith("is empty")


@pytest.mark.parametrize(
    ("content", "reason"),
    [('{"caption"', "cannot be read"), ("[]", '"caption"'), ('{"caption": 3}', '"caption"')],
)
def test_folder_with_a_broken_caption(content: str, reason: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    save_image(source / "one.png")
    (source / "one.json").write_text(content)
    with pytest.raises(InputError, match=reason):
        main(["--format", "folder", str(source), str(tmp_path / "out")])


# What is written is all there, or not there.


def test_interrupted_run_leaves_nothing(
    llava: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = SampleWriter.write

    def interrupt(self: SampleWriter, *args: Any) -> str:
        if self.num_samples == 3:
            raise KeyboardInterrupt
        return write(self, *args)

    monkeypatch.setattr(SampleWriter, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        llava([entry(id=str(number)) for number in range(6)], "--samples-per-shard", "2")
    assert {path.name for path in tmp_path.iterdir()} == {"images", "source.json"}


def test_killed_run_leaves_nothing_under_its_name(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "data_pipeline.prepare", "--format", "grid", str(out)]
    process = subprocess.Popen([*command, "--train-samples", "1000000"], cwd=ROOT)
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(".out.partial-*/train/000000.tar")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not out.exists()
    prepare_demo("grid", out, train_samples=10, eval_samples=3)
    assert len(read_shards(out / "train")) == 10


def test_existing_output_is_kept_unless_told(llava: Any, tmp_path: Path) -> None:
    out = llava([entry(id="first")])
    with pytest.raises(InputError, match=r"out .*not empty.*--overwrite"):
        llava([entry(id="second")])
    assert [sample["__key__"] for sample in read_shards(out)] == ["first"]
    llava([entry(id="second")], "--overwrite")
    assert [sample["__key__"] for sample in read_shards(out)] == ["second"]
    with pytest.raises(InputError, match="no usable sample"):
        llava([], "--overwrite")
    assert [sample["__key__"] for sample in read_shards(out)] == ["second"]
    assert {path.name for path in tmp_path.iterdir()} == {"images", "source.json", "out"}


def test_overwrite_spares_what_it_did_not_write(llava: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match=r"not written by this tool"):
        llava([entry()], "--overwrite")
    assert (tmp_path / "out/thesis.txt").read_text() == "years of work"


def test_overwrite_spares_its_own_source(tmp_path: Path) -> None:
    out = tmp_path / "out"
    source = out / "source"
    save_image(source / "one.png")
    (source / "one.txt").write_text("A caption.")
    (out / "prepare.json").write_text("{}")
    with pytest.raises(InputError, match="lies inside"):
        main(["--format", "folder", str(source), str(out), "--overwrite"])
    assert (source / "one.png").exists()


def test_empty_folder_may_be_filled_and_a_file_not(llava: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    out = llava([entry()])
    assert len(read_shards(out)) == 1
    # As any other new folder: not only for its owner, as temporary folders are.
    (tmp_path / "plain").mkdir()
    assert out.stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        prepare_demo("grid", tmp_path / "file", train_samples=1, eval_samples=3)


# The command line.


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--format grid OUT --detail 3", "3 .*image size of 32"),
        ("--format grid OUT --detail 2 2", "give one or more different"),
        ("--format grid OUT --eval-samples 10", "multiple of 3"),
        ("--format pages OUT --eval-samples 10", "multiple of 3"),
        ("--format scans OUT --eval-samples 12", "multiple of 5"),
        ("--format scans OUT --detail 7", "7 .*image size of 60"),
        ("--format grid OUT --train-samples 0", "train samples .*0"),
        ("--format digits OUT --seed -1", "must not be negative"),
        ("--format digits OUT --images DIR", "--images is for --format records"),
        ("--format llava SRC OUT --seed 1", "--seed is for --format digits"),
        ("--format llava OUT", "takes the paths SRC OUT, found: OUT"),
        ("--format digits SRC OUT", "takes the paths OUT, found: SRC OUT"),
        ("--format llava missing.json OUT", "missing.json is not a file"),
        ("--format llava missing.json OUT --images none", "none does not exist"),
        ("--format folder missing OUT", "missing is not a folder"),
        ("--format folder . OUT", "no image in ."),
        ("--format grid OUT --samples-per-shard 0", "must be at least 1"),
    ],
)
def test_wrong_options(
    options: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=expected):
        main(options.split())
    assert not list(tmp_path.iterdir())


def test_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "data_pipeline.prepare"]
    out = tmp_path / "out"
    options = ["--format", "grid", "--train-samples", "6", "--eval-samples", "3", str(out)]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert f"{out}/train: 6 samples, 6 images" in done.stdout
    assert done.stderr == ""  # no progress bar where there is no terminal
    again = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 2
    assert again.stderr.startswith("error: ") and "--overwrite" in again.stderr
    assert "Traceback" not in again.stderr
