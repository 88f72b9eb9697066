"""Demo corpus "digits": grids of real handwritten digits, the 8 x 8 scans of scikit-learn."""

import numpy as np
from PIL import Image

from data_pipeline.errors import InputError
from data_pipeline.prepare.cells import CellCorpus

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
