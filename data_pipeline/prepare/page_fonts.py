"""The fonts of the demo corpus "pages", all of which matplotlib ships, and text set in them."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from data_pipeline.prepare.demo_sample import Glyph, Split

FONTS: dict[Split, tuple[str, ...]] = {
    "train": (
        "DejaVuSans",
        "DejaVuSans-Bold",
        "DejaVuSans-Oblique",
        "DejaVuSansMono",
        "DejaVuSerif",
        "STIXGeneralItalic",
        "STIXGeneral",
        "STIXGeneralBol",
        "cmr10",
        "cmss10",
    ),
    "eval": ("DejaVuSansMono-Bold", "DejaVuSerif-Italic", "cmb10"),
}


@dataclass(frozen=True)
class Print:
    """A font at a size, which is given as the height of its x in pixels: equally large to read."""

    font: str
    x_height: float

    def width(self, text: str) -> float:
        """Width of a text in pixels."""
        return _load(self).getlength(text)

    def write(self, image: Image.Image, left: float, baseline: int, text: str) -> list[Glyph]:
        """Write on a grey picture, in black; returns what was written, glyph by glyph."""
        font = _load(self)
        ImageDraw.Draw(image).text((left, baseline), text, fill=0, font=font, anchor="ls")
        ends = [left + font.getlength(text[:number]) for number in range(len(text) + 1)]
        top, bottom = baseline - round(1.6 * self.x_height), baseline + round(0.5 * self.x_height)
        return [
            Glyph(name, round(start), top, round(end), bottom)
            for name, start, end in zip(text, ends, ends[1:], strict=False)
            if name != " "
        ]


@cache
def _load(chosen: Print) -> ImageFont.FreeTypeFont:
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{chosen.font}.ttf"

    def at(size: float) -> ImageFont.FreeTypeFont:
        # Not Raqm, which some builds of Pillow lack: the same pixels everywhere.
        return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)

    _, top, _, bottom = at(100).getbbox("x", anchor="ls")
    return at(100 * chosen.x_height / (bottom - top))
