"""The demo corpora: right answers, an even mix, nothing of the evaluation in training."""

import io
import re
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from data_pipeline.prepare.__main__ import main
from data_pipeline.prepare.cells import CellCorpus, Split, draw_samples
from data_pipeline.prepare.demo_corpus import DemoFormat, prepare_demo
from data_pipeline.prepare.digits import digits_corpus, scans_corpus
from data_pipeline.prepare.grid import COLORS, grid_corpus
from data_pipeline.tokenizer import load_tokenizer
from tests.data_pipeline.pictures import decode_rgb
from tests.data_pipeline.shards import read_shards

DETAILS = {"digits": (1, 2), "scans": (1, 2, 3, 4, 5), "grid": (1, 2, 4)}
SIDES = {"digits": 32, "scans": 60, "grid": 32}


@pytest.fixture(scope="module", params=["digits", "scans", "grid"])
def demo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """(format, folder) of a small demo corpus, several shards."""
    out = tmp_path_factory.mktemp("demo") / request.param
    options = ["--train-samples", "600", "--eval-samples", "60", "--samples-per-shard", "250"]
    main(["--format", request.param, str(out), *options])
    return request.param, out


@lru_cache
def scans() -> Any:
    """scikit-learn's own data: the scans and which digit each of them is."""
    return load_digits()


def names_of(format: str, cells: list[int]) -> list[str]:
    if format == "grid":
        return [tuple(COLORS)[cell] for cell in cells]
    return [str(scans().target[cell]) for cell in cells]


def ask_and_answer(sample: dict[str, Any]) -> tuple[str, str]:
    user, assistant = sample["json"]["messages"]
    assert [part["type"] for part in user["content"]] == ["image", "text"]
    return user["content"][1]["text"], assistant["content"][0]["text"]


def test_demo_is_complete(demo: tuple[str, Path]) -> None:
    format, out = demo
    train, held_out = read_shards(out / "train"), read_shards(out / "eval")
    assert (len(train), len(held_out)) == (600, 60)
    assert len(list((out / "train").glob("*.tar"))) == 3
    keys = [sample["__key__"] for sample in train + held_out]
    assert len(set(keys)) == len(keys)
    picture = Image.open(io.BytesIO(train[0]["0.png"]))
    side = SIDES[format]
    assert picture.size == (side, side)
    assert picture.mode == {"digits": "L", "scans": "L", "grid": "RGB"}[format]
    assert {path.name for path in out.iterdir()} == {
        *("train", "eval", "tokenizer.model", "prepare.json")
    }


def test_demo_is_spread_evenly(demo: tuple[str, Path]) -> None:
    format, out = demo
    details = DETAILS[format]
    for split, total in (("train", 600), ("eval", 60)):
        counts = Counter(
            (sample["json"]["metadata"]["detail"], sample["json"]["metadata"]["question"])
            for sample in read_shards(out / split)
        )
        for k in details:
            mix = {
                question: number
                for (detail, question), number in counts.items()
                if detail == f"k={k}"
            }
            share = total // len(details)
            parts = {"all": 0.6, "cell": 0.2, "row": 0.15, "count": 0.05}
            if (format, split) == ("scans", "eval"):
                parts = {"cell": 0.5, "row": 0.5}
            assert mix == {question: round(part * share) for question, part in parts.items()}


def test_demo_answers_are_right(demo: tuple[str, Path]) -> None:
    format, out = demo
    seen = set()
    for sample in read_shards(out / "train") + read_shards(out / "eval"):
        metadata = sample["json"]["metadata"]
        k = int(metadata["detail"].removeprefix("k="))
        cells = names_of(format, metadata["cells"])
        assert len(cells) == k * k
        question, answer = ask_and_answer(sample)
        words = question.rstrip(".?").split()
        if metadata["question"] == "all":
            expected = " ".join(cells)
        elif metadata["question"] == "cell":
            row, column = int(words[-3]), int(words[-1])
            expected = cells[(row - 1) * k + column - 1]
        elif metadata["question"] == "row":
            row = int(words[-1])
            expected = " ".join(cells[(row - 1) * k : row * k])
        else:
            name = words[2] if format == "grid" else words[2].removesuffix("s")
            expected = str(cells.count(name))
        assert answer == expected, question
        seen.add((metadata["question"], answer))
    assert {answer for kind, answer in seen if kind == "count"} >= {"0", "1", "2"}


def test_demo_pictures_show_the_cells(demo: tuple[str, Path]) -> None:
    format, out = demo
    for sample in read_shards(out / "eval"):
        metadata = sample["json"]["metadata"]
        k = int(metadata["detail"].removeprefix("k="))
        side = SIDES[format] // k
        pixels = np.asarray(decode_rgb(sample["0.png"]), dtype=float)
        for number, item in enumerate(metadata["cells"]):
            top, left = number // k * side, number % k * side
            cell = pixels[top : top + side, left : left + side]
            if format == "grid":
                assert (cell == list(COLORS.values())[item]).all()
            else:
                # Averaged back to 8 x 8, a cell is the scan again, but for the blur of resizing.
                scan = scans().images[item] * 255 / 16
                grey = Image.fromarray(cell[..., 0].astype(np.float32))
                small = np.asarray(grey.resize((8, 8), Image.Resampling.BOX))
                # More of it where 8 does not divide the side; most scans are over 35 apart.
                assert np.abs(small - scan).mean() < {"digits": 15, "scans": 25}[format]


def cells_drawn(corpus: CellCorpus, split: Split, number: int, seed: int) -> set[tuple[int, ...]]:
    samples = draw_samples(corpus, split, number, corpus.details, seed)
    return {sample.layout for sample in samples if sample.k > 1}


def test_held_out_scans_are_never_trained_on(demo: tuple[str, Path]) -> None:
    corpus = scans_corpus() if demo[0] == "scans" else digits_corpus()
    train, held_out = (
        {
            cell
            for seed in (0, 1)
            for layout in cells_drawn(corpus, split, number, seed)
            for cell in layout
        }
        for split, number in (("train", 3000), ("eval", 600))
    )
    assert not train & held_out
    # Nearly all scans of both parts were drawn, so the check above had something to find.
    assert len(train) > 1400
    assert len(held_out) > 350
    # The same for what was written; that the pictures show these cells is tested above.
    format, out = demo
    if format != "grid":
        for split, forbidden in (("train", held_out), ("eval", train)):
            for sample in read_shards(out / split):
                assert forbidden.isdisjoint(sample["json"]["metadata"]["cells"])


def test_grid_evaluation_images_are_not_trained_on() -> None:
    corpus = grid_corpus()
    held_out = cells_drawn(corpus, "eval", 600, 0)
    assert len(held_out) > 350
    assert not cells_drawn(corpus, "train", 6000, 0) & held_out


def test_every_word_is_one_token(demo: tuple[str, Path]) -> None:
    format, out = demo
    tokenizer = load_tokenizer(out / "tokenizer.model")
    assert tokenizer.vocab_size <= 420
    for word in ("user", "assistant", "system", *names_of(format, list(range(10)))):
        assert len(tokenizer.encode(word)) == 1, word
    for sample in read_shards(out / "train"):
        question, answer = ask_and_answer(sample)
        for text in (question, answer):
            # "7s" is a digit and an s.
            marks = sum(text.count(mark) for mark in ".?") + len(re.findall(r"[0-9]s", text))
            assert len(tokenizer.encode(text)) <= len(text.split()) + marks
            assert tokenizer.decode(tokenizer.encode(text)) == text
        assert len(tokenizer.encode(answer)) == len(answer.split())


@pytest.mark.parametrize("format", ["scans", "grid", "pages"])
def test_demo_depends_on_the_seed_only(tmp_path: Path, format: DemoFormat) -> None:
    def make(name: str, seed: int) -> dict[str, bytes]:
        out = tmp_path / name
        prepare_demo(format, out, train_samples=30, eval_samples=30, seed=seed)
        return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*.*")}

    first = make("first", 3)
    assert make("again", 3) == first
    other = make("other", 4)
    assert other["train/000000.tar"] != first["train/000000.tar"]
    assert other["eval/000000.tar"] != first["eval/000000.tar"]


def test_more_samples_keep_the_first_ones(tmp_path: Path) -> None:
    prepare_demo("grid", tmp_path / "few", train_samples=20, eval_samples=3)
    prepare_demo("grid", tmp_path / "many", train_samples=50, eval_samples=3)
    few, many = (read_shards(tmp_path / name / "train") for name in ("few", "many"))
    assert [s["json"] for s in few] == [s["json"] for s in many[:20]]
