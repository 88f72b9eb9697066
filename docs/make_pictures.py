"""The pictures of the README: `make pictures` writes them to docs/images/ again.

accuracy.png     exact match against tokens per image, of one model; from the recorded run of the
                 demo on grids of colours, training/results/grid.json.
token_grids.png  a photograph with its tiles and tokens at three token counts. It is china.jpg of
                 scikit-learn, by danielbuechele (flickr.com), under CC BY 2.0.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import matplotlib
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_sample_image

from training.config import load_config
from training.demo.token_grid import draw_token_grid

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
RECORD = ROOT / "training" / "results" / "grid.json"

# As the large presets tile: 384 px, at most 6 tiles and a thumbnail.
TILING = SimpleNamespace(tile_size=384, min_tiles=1, max_tiles=6, thumbnail=True)
SIDES = (8, 12, 16)
PANEL_PIXELS, CAPTION_PIXELS, GAP_PIXELS = 560, 30, 12
COLOURS = 64  # of the palette: a photograph in full colour is four times as large


def accuracy(path: Path) -> None:
    """Plot the recorded accuracy of every difficulty against the tokens per image.

    Hollow points are counts that training never drew.
    """
    rows = json.loads(RECORD.read_text())["evaluation"]
    tokens = load_config(ROOT / "training" / "configs" / "grid.yaml").data.tokens
    drawn = {side**2 for side in tokens.trained_sides}
    figure, axes = plt.subplots(figsize=(6, 3.2), dpi=150)
    for detail in sorted({row["detail"] for row in rows} - {"all"}):
        points = sorted(
            (row["num_image_tokens"], 100 * row["accuracy"])
            for row in rows
            if row["detail"] == detail
        )
        k = detail.removeprefix("k=")
        (line,) = axes.plot(*zip(*points, strict=True), marker="o", label=f"{k} x {k} colours")
        unseen = [point for point in points if point[0] not in drawn]
        if unseen:
            color = line.get_color()
            axes.plot(*zip(*unseen, strict=True), "o", color="white", mec=color, zorder=3)
    counts = sorted({row["num_image_tokens"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set(xlabel="vision tokens per image", ylabel="exact match, %", ylim=(0, 102))
    axes.set_title("One model at every count (demo grid.yaml); hollow: not trained", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.tight_layout()
    # Without the version of matplotlib, the same record gives the same file.
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def token_grids(path: Path) -> None:
    """Draw the photograph once for each side n, side by side, with the count below."""
    photo = Image.fromarray(load_sample_image("china.jpg"))
    panels = []
    for side in SIDES:
        drawn, tiles = draw_token_grid(photo, SimpleNamespace(image_processor=TILING), side)
        height = round(PANEL_PIXELS * drawn.height / drawn.width)
        panels.append((drawn.resize((PANEL_PIXELS, height), Image.Resampling.LANCZOS), side, tiles))
    size = (
        len(panels) * (PANEL_PIXELS + GAP_PIXELS) - GAP_PIXELS,
        panels[0][0].height + CAPTION_PIXELS,
    )
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(19)
    for number, (panel, side, tiles) in enumerate(panels):
        left = number * (PANEL_PIXELS + GAP_PIXELS)
        sheet.paste(panel, (left, 0))
        text = f"n = {side}: {tiles} tiles x {side**2} = {tiles * side**2} tokens"
        draw.text((left, panel.height + 4), text, fill="black", font=font)
    sheet.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    """Write both pictures."""
    IMAGES.mkdir(exist_ok=True)
    for draw in (accuracy, token_grids):
        path = IMAGES / f"{draw.__name__}.png"
        draw(path)
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
