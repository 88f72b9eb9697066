"""The run as a picture: losses per token count, accuracy over the steps and at the end."""

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib.ticker import LogLocator

from data_pipeline.plotting import picture
from training.metrics.metrics_log import METRICS, read_evaluations, read_metrics

Row = dict[str, Any]
ALL = "all"


def plot_run(run: Path, accuracy: dict[str, dict[int, float]], out: Path) -> None:
    """Write a PNG of the losses (total and per token count) and of the accuracy.

    Where there was more than one evaluation, also of the accuracy at each.

    Args:
        run: the run's output_dir.
        accuracy: level of detail -> token count -> accuracy in 0..1; may be empty.
        out: the PNG.
    """
    history = read_evaluations(run)
    columns = 3 if len(history) > 1 else 2
    with picture(out, (6 * columns, 4.5), columns=columns) as (_, axes):
        _plot_losses(axes[0], read_metrics(run / METRICS), history)
        if len(history) > 1:
            _plot_history(axes[1], history)
        _plot_accuracy(axes[-1], accuracy)


def _plot_losses(axes: Any, rows: list[Row], history: list[Row]) -> None:
    counts = sorted({int(k.removeprefix("loss_")) for row in rows for k in row if k[5:].isdigit()})
    for key, label in [("loss", "all"), *((f"loss_{c}", f"{c} tokens") for c in counts)]:
        steps, values = _points(rows, key)
        style = {"color": "black", "linewidth": 1.8} if key == "loss" else {"linewidth": 1.0}
        axes.plot(steps, smooth(values), label=label, **style)
    if held_out := [row for row in history if "loss" in row]:
        axes.plot(*_points(held_out, "loss"), "k--o", markersize=4, label="held-out")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set(xlabel="step", ylabel="loss per supervised token", title="Training loss, smoothed")
    axes.grid(alpha=0.3)
    if rows:
        axes.legend()


def _points(rows: list[Row], key: str) -> tuple[list[int], list[float]]:
    """Steps and values where there is a finite one."""
    found = [(row["step"], row.get(key)) for row in rows]
    points = [(s, v) for s, v in found if isinstance(v, int | float) and math.isfinite(v)]
    return [step for step, _ in points], [value for _, value in points]


def _plot_history(axes: Any, history: list[Row]) -> None:
    """Accuracy of all levels of detail together at each evaluation, per token count."""
    by_count: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for row in history:
        for result in row["results"]:
            if result["detail"] == ALL:
                point = (row["step"], 100 * result["accuracy"])
                by_count[result["num_image_tokens"]].append(point)
    for count, points in sorted(by_count.items()):
        axes.plot(*zip(*points, strict=True), marker="o", label=f"{count} tokens")
    axes.set(xlabel="step", ylabel="exact match, %", ylim=(-3, 103))
    axes.set_title("Held-out accuracy at each evaluation")
    axes.grid(alpha=0.3)
    if by_count:
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
