"""Accuracy against token count as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.plotting import BLUE, picture
from training.evaluate.in_training import ALL

_MOST_DETAILS = 8


def plot_accuracy(entries: Sequence[Mapping[str, Any]], out: Path, title: str) -> None:
    """Write a PNG: accuracy with its interval per count, unseen counts hollow."""
    with picture(out, (7.5, 4.5)) as (_, axes):
        _draw(axes, entries)
        axes.set_title(title)


def _draw(axes: Any, entries: Sequence[Mapping[str, Any]]) -> None:
    counts = [entry["num_image_tokens"] for entry in entries]
    for number, detail in enumerate(_details(entries[0]), 1):
        values = [100 * entry["by_detail"][detail]["accuracy"] for entry in entries]
        axes.plot(counts, values, f"C{number}", marker=".", linewidth=1, alpha=0.7, label=detail)
    accuracy = [100 * entry["accuracy"] for entry in entries]
    low, high = ([100 * entry[name] for entry in entries] for name in ("low", "high"))
    axes.fill_between(counts, low, high, color=BLUE, alpha=0.15, linewidth=0)
    axes.plot(counts, accuracy, color=BLUE, linewidth=1.8)
    for unseen, face, name in ((False, BLUE, "trained"), (True, "white", "unseen")):
        own = [i for i, entry in enumerate(entries) if (entry["trained"] is False) == unseen]
        errors = [[accuracy[i] - low[i] for i in own], [high[i] - accuracy[i] for i in own]]
        label = name if entries[0]["trained"] is not None else "all samples"
        if own:
            axes.errorbar(
                [counts[i] for i in own],
                [accuracy[i] for i in own],
                yerr=[[max(0.0, e) for e in side] for side in errors],
                fmt="o",
                color=BLUE,
                markerfacecolor=face,
                capsize=3,
                label=label,
            )
    if len(counts) > 1:
        axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set(xlabel="vision tokens per tile", ylabel="accuracy, % (95 % interval)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _details(entry: Mapping[str, Any]) -> list[str]:
    details = [detail for detail in entry["by_detail"] if detail != ALL]
    return details if 1 < len(details) <= _MOST_DETAILS else []
