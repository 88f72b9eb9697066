"""Pictures of numbers, drawn without a display and written whole."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

from data_pipeline.errors import InputError
from data_pipeline.files import write_atomically

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

BLUE = "#2a6fbb"


@contextmanager
def picture(
    out: Path,
    size: tuple[float, float],
    rows: int = 1,
    columns: int = 1,
    bbox_inches: str | None = None,
) -> Iterator[tuple[Figure, Any]]:
    """Yield a figure and its axes, as `plt.subplots` does; written to `out` when the block ends.

    Args:
        out: the picture, in the format its suffix names; missing folders are created.
        size: width and height in inches, at 120 dots each.
        bbox_inches: "tight" to fit the picture to what was drawn.

    Raises:
        InputError: `out` cannot be written, or its suffix names no format.
    """
    figure, axes = plt.subplots(rows, columns, figsize=size, constrained_layout=True)
    kind = out.suffix.lstrip(".").lower() or "png"
    try:
        if kind not in (known := figure.canvas.get_supported_filetypes()):
            raise InputError(
                f"cannot write {out}: {kind} is not a format of pictures; use any of "
                f"{', '.join(sorted(known))}"
            )
        yield figure, axes
        drawn = io.BytesIO()
        figure.savefig(drawn, format=kind, dpi=120, bbox_inches=bbox_inches)
    finally:
        plt.close(figure)
    try:
        write_atomically(out, drawn.getvalue())
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror}; name another path") from error
