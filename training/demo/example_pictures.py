"""Pictures to begin with: those of a folder, or three that are drawn here."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from data_pipeline.errors import InputError
from data_pipeline.processor.source_tokenflex import load_rgb

_QUESTION = "What does the image show?"
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_BARS = {"A": 3, "B": 7, "C": 5}


def examples_in(folder: Path) -> list[tuple[str, str]]:
    """(picture, question) of a folder's pictures; NAME.txt beside NAME.png holds its question.

    Raises:
        InputError: there is no picture in it, or one that cannot be used.
    """
    found = []
    for path in sorted(folder.glob("*")):
        if path.suffix.lower() in _SUFFIXES:
            try:
                load_rgb(path, "the example")
            except ValueError as error:
                raise InputError(str(error)) from error
            text = path.with_suffix(".txt")
            question = text.read_text(encoding="utf-8").strip() if text.is_file() else _QUESTION
            found.append((str(path), question))
    if not found:
        raise InputError(
            f"--examples {folder} holds no pictures; give a folder of them, each with its question "
            "in a .txt file of the same name"
        )
    return found


def draw_examples(folder: Path) -> list[tuple[str, str]]:
    """(picture, question): shapes, words, and a chart, written into a folder."""
    drawn = {
        "shapes": (_shapes(), "How many shapes are there, and of which colours?"),
        "words": (_words(), "What does the sign say?"),
        "chart": (_chart(), "Which bar is the highest?"),
    }
    found = []
    for name, (picture, question) in drawn.items():
        picture.save(folder / f"{name}.png")
        found.append((str(folder / f"{name}.png"), question))
    return found


def _canvas(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    picture = Image.new("RGB", (width, height), "white")
    return picture, ImageDraw.Draw(picture)


def _shapes() -> Image.Image:
    picture, draw = _canvas(480, 320)
    draw.ellipse((40, 60, 200, 220), fill="crimson")
    draw.rectangle((230, 130, 350, 250), fill="royalblue")
    draw.polygon([(380, 260), (450, 260), (415, 120)], fill="seagreen")
    return picture


def _words() -> Image.Image:
    picture, draw = _canvas(640, 320)
    draw.rectangle((30, 60, 610, 260), fill="darkgreen")
    _write(draw, ["Platform 7", "Harbour line, 10:42"], (60, 85), 56, "white")
    return picture


def _chart() -> Image.Image:
    picture, draw = _canvas(480, 360)
    for number, (name, value) in enumerate(_BARS.items()):
        left = 60 + 140 * number
        draw.rectangle((left, 300 - 36 * value, left + 90, 300), fill="darkorange")
        _write(draw, [name], (left + 34, 308), 32, "black")
    return picture


def _write(
    draw: ImageDraw.ImageDraw, lines: Sequence[str], at: tuple[int, int], size: int, colour: str
) -> None:
    for number, line in enumerate(lines):
        place = (at[0], at[1] + number * 3 * size // 2)
        draw.text(place, line, fill=colour, font=ImageFont.load_default(size))
