"""The demo corpus of pages: right answers, whole and legible, nothing held out is trained on."""

import io
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.errors import InputError
from data_pipeline.prepare.__main__ import main
from data_pipeline.prepare.demo_corpus import prepare_demo
from data_pipeline.prepare.demo_sample import DemoSample, Split
from data_pipeline.prepare.page_fonts import FONTS, Print
from data_pipeline.prepare.pages import Pages
from data_pipeline.tokenizer import load_tokenizer
from tests.data_pipeline.shards import read_shards

INK = 60
"""Text is darker than this; bars and rules are not."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "pages"
    main(["--format", "pages", str(out), "--train-samples", "360", "--eval-samples", "90"])
    return out


def drawn(split: Split, number: int, seed: int = 0) -> list[DemoSample]:
    return list(Pages().samples(split, number, seed))


def expected(question: str, title: str, rows: Sequence[Sequence[str]]) -> str:
    """The answer, read off what is on the page."""
    if question == "What is the title?":
        return title
    row, *column = (int(number) - 1 for number in re.findall("[0-9]+", question))
    if question.startswith("Read row"):
        return " ".join(rows[row])
    if column:
        return rows[row][column[0]]
    (number,) = [text for text in rows[row] if text.isdigit()]
    return number


def test_answers_are_on_the_page(folder: Path) -> None:
    for sample in read_shards(folder / "train") + read_shards(folder / "eval"):
        user, assistant = sample["json"]["messages"]
        question, answer = user["content"][1]["text"], assistant["content"][0]["text"]
        page = sample["json"]["metadata"]
        assert answer == expected(question, page["title"], page["rows"]), question
        kinds = {"word": r"[a-z]{4}", "number": r"[0-9]{1,2}", "row": r"[a-z0-9]+( [a-z0-9]+)+"}
        assert re.fullmatch(kinds[page["detail"]], answer)


def test_pictures_are_those_of_the_samples(folder: Path) -> None:
    """What was written is what is painted, in the size that the metadata tells."""
    for stored, sample in zip(read_shards(folder / "train"), drawn("train", 360), strict=True):
        assert stored["json"]["metadata"] == sample.metadata
        picture = Image.open(io.BytesIO(stored["0.png"]))
        assert list(picture.size) == sample.metadata["size"]
        assert picture.mode == "L"
        assert np.array_equal(np.asarray(picture), np.asarray(sample.paint().image))


def test_levels_and_kinds_take_turns(folder: Path) -> None:
    for split, total in (("train", 360), ("eval", 90)):
        found = [sample["json"]["metadata"] for sample in read_shards(folder / split)]
        counts = Counter((page["detail"], page["page"]) for page in found)
        assert len(counts) == 9 and set(counts.values()) == {total // 9}
        assert {tuple(page["size"]) for page in found} == {
            *((64, 64), (128, 64), (64, 128), (128, 128))
        }


def test_pages_are_whole_and_legible() -> None:
    """Every glyph is on the page, in its own place, with ink in it; ink is nowhere else."""
    for sample in drawn("train", 300) + drawn("eval", 100):
        page = sample.metadata
        image, glyphs = sample.paint()
        rows = page["rows"]
        if page["page"] == "chart":
            rows = [[text for text in row if not text.isdigit()] for row in rows]
        written = Counter(page["title"] + "".join(text for row in rows for text in row))
        assert Counter(glyph.name for glyph in glyphs) == written
        pixels = np.asarray(image)
        ink = pixels < INK
        readable = np.zeros(ink.shape, int)
        for glyph in glyphs:
            box = np.s_[glyph.top : glyph.bottom, glyph.left : glyph.right]
            readable[box] += 1
            assert (255.0 - pixels[box]).sum() > 3 * 255, (page["font"], glyph)
            assert glyph.left >= 0 and glyph.right <= image.width
            assert glyph.top >= 0 and glyph.bottom <= image.height
        # A letter may reach a pixel over its own width, as slanted ones do.
        wide = readable + np.roll(readable, 1, 1) + np.roll(readable, -1, 1)
        assert not (ink & (wide == 0)).any(), page
        assert (readable <= 1).all(), page


def longest_run(row: np.ndarray) -> int:
    """Of True, in one row of pixels."""
    return max(map(len, "".join("x" if there else " " for there in row).split()), default=0)


def test_bars_are_as_long_as_their_numbers() -> None:
    for sample in drawn("train", 180):
        if sample.metadata["page"] != "chart":
            continue
        runs = [longest_run(row) for row in np.asarray(sample.paint().image) == 90]
        unit = {64: 3, 128: 10}[sample.metadata["size"][0]]
        # A bar is six pixels high, and shades of a letter are less wide than the shortest bar.
        lengths = [run / unit for run in runs if run >= unit][::6]
        values = [int(text) for row in sample.metadata["rows"] for text in row if text.isdigit()]
        assert lengths == values


def facts(samples: list[DemoSample]) -> dict[str, set[Any]]:
    pages = [sample.metadata for sample in samples]
    texts = {text for page in pages for row in page["rows"] for text in row}
    return {
        "fonts": {page["font"] for page in pages},
        "layouts": {(page["page"], *page["size"], *page["layout"]) for page in pages},
        "words": {text for text in texts if text.isalpha()} | {page["title"] for page in pages},
        "numbers": {text for text in texts if len(text) == 2 and text.isdigit()},
    }


def test_fonts_words_numbers_and_layouts_are_held_out() -> None:
    train = facts(drawn("train", 1500) + drawn("train", 1500, seed=1))
    held_out = facts(drawn("eval", 600))
    for what, found in held_out.items():
        assert not found & train[what], what
    assert (len(train["fonts"]), len(held_out["fonts"])) == (10, 3)
    assert len(train["layouts"]) > 200 and len(held_out["layouts"]) == 60
    assert len(train["words"]) > 450 and len(held_out["words"]) > 40
    assert len(train["numbers"]) > 70 and len(held_out["numbers"]) > 5
    # Each part of what is held out is trained on: letters, syllables, digits, sides and sizes.
    for what in ("words", "numbers"):
        parts = {
            text[at : at + len(text) // 2] for text in held_out[what] for at in (0, len(text) // 2)
        }
        assert parts <= {
            text[at : at + len(text) // 2] for text in train[what] for at in (0, len(text) // 2)
        }
    for place in range(7):
        choices = {layout[place] for layout in train["layouts"]}
        assert {layout[place] for layout in held_out["layouts"]} == choices


def test_all_fonts_are_equally_large() -> None:
    widths = {
        font: Print(font, 5.0).width("pamitulosk") / 2.5
        for fonts in FONTS.values()
        for font in fonts
    }
    assert max(widths.values()) < 1.4 * min(widths.values())


def test_a_syllable_or_a_digit_is_a_token(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    assert tokenizer.vocab_size <= 450
    for sample in drawn("train", 300) + drawn("eval", 90):
        words = sample.answer.split()
        length = sum(2 if word.isalpha() else len(word) for word in words)
        assert len(tokenizer.encode(sample.answer)) == length, sample.answer
        for text in (sample.question, sample.answer):
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_pages_have_their_own_sizes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="own sizes"):
        prepare_demo("pages", tmp_path / "out", train_samples=3, eval_samples=3, image_size=64)
    for option in (["--image-size", "64"], ["--detail", "2"]):
        with pytest.raises(InputError, match=f"{option[0]} is for --format digits, not pages"):
            main(["--format", "pages", str(tmp_path / "out"), *option])
