"""The run as a picture: loss curves per token count, accuracy per level of detail."""

import math
from pathlib import Path
from typing import Any

from matplotlib.ticker import LogLocator

from data_pipeline.plotting import picture
from training.metrics.metrics_log import read_metrics


def plot_run(metrics_path: Path, accuracy: dict[str, dict[int, float]], out: Path) -> None:
    """Write a PNG of the loss (total and per token count) and of the accuracy.

    Args:
        metrics_path: the run's metrics.jsonl.
        accuracy: level of detail -> token count -> accuracy in 0..1; may be empty.
        out: the PNG.
    """
    rows = read_metrics(metrics_path)
    with picture(out, (12, 4.5), columns=2) as (_, (left, right)):
        _plot_losses(left, rows)
        _plot_accuracy(right, accuracy)


def _plot_losses(axes: Any, rows: list[dict[str, Any]]) -> None:
    counts = sorted({int(k.removeprefix("loss_")) for row in rows for k in row if k[5:].isdigit()})
    for key, label in [("loss", "all"), *((f"loss_{c}", f"{c} tokens") for c in counts)]:
        points = [(row["step"], row[key]) for row in rows if math.isfinite(row.get(key, math.nan))]
        steps, values = zip(*points, strict=True) if points else ((), ())
        style = {"color": "black", "linewidth": 1.8} if key == "loss" else {"linewidth": 1.0}
        axes.plot(steps, smooth(list(values)), label=label, **style)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set(xlabel="step", ylabel="loss per supervised token", title="Training loss, smoothed")
    axes.grid(alpha=0.3)
    if rows:
        axes.legend()


def _plot_accuracy(axes: Any, accuracy: dict[str, dict[int, float]]) -> None:
    for detail, by_count in accuracy.items():
        counts = sorted(by_count)
        axes.plot(counts, [100 * by_count[c] for c in counts], marker="o", label=detail)
    axes.set_xscale("log", base=2)
    ticks = sorted({c for by_count in accuracy.values() for c in by_count})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel="vision tokens per tile", ylabel="exact match, %", ylim=(-3, 103))
    axes.set_title("Held-out accuracy")
    axes.grid(alpha=0.3)
    if accuracy:
        axes.legend()


def smooth(values: list[float], fraction: float = 0.02) -> list[float]:
    """Running mean over the last `fraction` of the series (at least 1 value)."""
    window = max(1, round(len(values) * fraction))
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [
        (sums[i + 1] - sums[max(0, i + 1 - window)]) / min(i + 1, window)
        for i in range(len(values))
    ]
