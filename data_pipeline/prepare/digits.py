"""Demo corpora "digits" and "scans": grids of handwritten digits, scikit-learn's 8 x 8 scans."""

from dataclasses import replace

import numpy as np
from PIL import Image

from data_pipeline.errors import InputError
from data_pipeline.prepare.cells import QUESTION_CYCLE, CellCorpus

# Not the run's seed: whatever is drawn, the held-out scans stay the same ones.
SPLIT_SEED = 20
HELD_OUT_FRACTION = 0.2


def digits_corpus() -> CellCorpus:
    """The 1797 scans of `sklearn.datasets.load_digits`, a fifth of them held out for evaluation.

    Scans are resized and nothing else. Item ids are scikit-learn's row numbers.

    Raises:
        InputError: scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError(
            "the digits corpus comes with scikit-learn, which is not installed: "
            "run `pip install scikit-learn`."
        ) from error
    scans = load_digits()
    # 17 grey levels, 0 .. 16.
    grey = np.round(scans.images * (255 / 16)).astype(np.uint8)  # [1797, 8, 8]

    def paint(item: int, side: int) -> Image.Image:
        return Image.fromarray(grey[item]).resize((side, side), Image.Resampling.BICUBIC)

    order = np.random.default_rng(SPLIT_SEED).permutation(len(grey))
    num_held_out = round(len(grey) * HELD_OUT_FRACTION)
    return CellCorpus(
        names=tuple("0123456789"),
        questions={
            "all": "List the digits.",
            "cell": "Which digit is in row {row} column {column}?",
            "row": "List row {row}.",
            "count": "How many {name}s are there?",
        },
        details=(1, 2),
        items={"train": np.sort(order[num_held_out:]), "eval": np.sort(order[:num_held_out])},
        labels=scans.target,
        paint=paint,
    )


def scans_corpus() -> CellCorpus:
    """The same scans at five densities: 1 to 25 in pictures of one size.

    Evaluation asks for a cell or a row: all of a dense grid is seldom right to the last digit.
    """
    return replace(
        digits_corpus(),
        details=(1, 2, 3, 4, 5),
        image_size=60,
        cycles={"train": QUESTION_CYCLE, "eval": ("cell", "row")},
    )
