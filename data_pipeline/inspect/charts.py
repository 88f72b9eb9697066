"""Charts as inline SVG; colours and fonts come from the page's style sheet."""

import math

import numpy as np
from markupsafe import Markup

_WIDTH, _HEIGHT = 460, 150  # in the units of the drawing, which is scaled to its place
_LEFT, _BOTTOM, _TOP = 4, 18, 12
_MAX_BINS = 46


def histogram(
    values: np.ndarray, unit: str, low: float | None = None, high: float | None = None
) -> Markup:
    """Counts of values [N] as bars, those of integers in bins of whole numbers.

    Args:
        unit: of the values, for the text that shows over a bar.
        low, high: ends of the axis; default the least and the largest value.
    """
    if not len(values):
        return Markup('<p class="none">nothing to count</p>')
    edges = _edges(
        values,
        float(values.min()) if low is None else float(low),
        float(values.max()) if high is None else float(high),
    )
    counts, _ = np.histogram(values, edges)
    scale = (_WIDTH - 2 * _LEFT) / (edges[-1] - edges[0])
    bars = []
    for left, right, count in zip(edges[:-1], edges[1:], counts.tolist(), strict=True):
        height = (_HEIGHT - _BOTTOM - _TOP) * count / counts.max()
        x = _LEFT + (left - edges[0]) * scale
        width = max((right - left) * scale - 1, 0.5)
        y = _HEIGHT - _BOTTOM - height
        span = _span(left, right, values.dtype.kind == "i")
        bars.append(
            Markup(
                '<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}">'
                "<title>{} {}: {:,}</title></rect>"
            ).format(x, y, width, height, span, unit, count)
        )
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img">{}{}</svg>').format(
        _WIDTH, _HEIGHT, Markup("").join(bars), _axis(edges, scale, int(counts.max()))
    )


def _edges(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Edges of the bins; an integer lies in the middle of its bin where each has its own."""
    if values.dtype.kind == "i":
        step = math.ceil((high - low + 1) / _MAX_BINS)
        return np.arange(low, high + step + 1, step) - (0.5 if step == 1 else 0)
    return np.linspace(low, high if high > low else low + 1, _MAX_BINS + 1)


def _span(left: float, right: float, whole: bool) -> str:
    if not whole:
        return f"{left:.3g} to {right:.3g}"
    first, last = math.ceil(left), math.ceil(right) - 1
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"


def _axis(edges: np.ndarray, scale: float, most: int) -> Markup:
    base = _HEIGHT - _BOTTOM
    parts = [
        Markup('<path class="axis" d="M0 {}H{}"/>').format(base, _WIDTH),
        Markup('<text class="most" x="{}" y="9">{:,}</text>').format(_LEFT, most),
    ]
    for tick in _ticks(float(edges[0]), float(edges[-1])):
        x = _LEFT + (tick - float(edges[0])) * scale
        anchor = "start" if x < 20 else "end" if x > _WIDTH - 20 else "middle"
        parts.append(
            Markup('<text x="{:.1f}" y="{}" text-anchor="{}">{:,g}</text>').format(
                x, _HEIGHT - 4, anchor, tick
            )
        )
    return Markup("").join(parts)


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    if low == -0.5 or float(low + 0.5).is_integer():
        step = max(1.0, step)  # whole numbers only
    first = math.ceil(low / step)
    return [round(i * step, 12) for i in range(first, math.floor(high / step) + 1)]


def grid_lines(cells: int, columns: int, rows: int) -> str:
    """Path of the lines between `cells` cells per tile side, tile borders left out.

    In units of a cell: the picture is columns * cells by rows * cells.
    """
    width, height = columns * cells, rows * cells
    vertical = (f"M{x} 0V{height}" for x in range(1, width) if x % cells)
    horizontal = (f"M0 {y}H{width}" for y in range(1, height) if y % cells)
    return "".join([*vertical, *horizontal])


def tile_lines(cells: int, columns: int, rows: int) -> str:
    """Path of the tile borders, the outer ones included, in the units of `grid_lines`."""
    width, height = columns * cells, rows * cells
    vertical = (f"M{x} 0V{height}" for x in range(0, width + 1, cells))
    horizontal = (f"M0 {y}H{width}" for y in range(0, height + 1, cells))
    return "".join([*vertical, *horizontal])
