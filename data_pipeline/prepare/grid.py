"""Demo corpus "grid": grids of plain coloured cells, which need no reading skill, only detail."""

import numpy as np
from PIL import Image

from data_pipeline.prepare.cells import CellCorpus

# Chosen to stay apart: any two differ by more than 90 in at least one channel.
COLORS = {
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "gray": (128, 128, 128),
    "red": (225, 25, 25),
    "green": (20, 140, 20),
    "blue": (20, 60, 235),
    "yellow": (255, 235, 20),
    "cyan": (20, 230, 240),
    "orange": (255, 130, 0),
    "purple": (140, 20, 170),
}


def grid_corpus() -> CellCorpus:
    """Cells of ten named colours; item ids are the places in `COLORS`."""
    names = tuple(COLORS)
    colors = tuple(COLORS.values())

    def paint(item: int, side: int) -> Image.Image:
        return Image.new("RGB", (side, side), colors[item])

    items = np.arange(len(names))
    return CellCorpus(
        names=names,
        questions={
            "all": "List the colors.",
            "cell": "Which color is in row {row} column {column}?",
            "row": "List row {row}.",
            "count": "How many {name} cells are there?",
        },
        details=(1, 2, 4),
        items={"train": items, "eval": items},
        labels=items,
        paint=paint,
    )
