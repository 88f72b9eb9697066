"""Accuracy of every arm against the tokens of an image, and against the FLOPs of an answer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.plotting import picture
from training.evaluate.in_training import ALL
from training.experiments.flexibility.flexibility_tables import shown_details


def plot_record(record: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write both pictures of a record; bands are the intervals over seeds, hollow was not drawn."""
    tokens, flops = folder / "flexibility_tokens.png", folder / "flexibility_flops.png"
    at = {count: float(count) for count in record["answer_gflop"]}
    _plot(record, tokens, at, "vision tokens per tile")
    _plot(record, flops, record["answer_gflop"], "GFLOP of an answer's forward pass")
    return [tokens, flops]


def _plot(record: Mapping[str, Any], out: Path, at: Mapping[str, float], label: str) -> None:
    panels = [
        (basis, detail)
        for basis, details in record["accuracy"].items()
        for detail in shown_details(details)
    ]
    with picture(out, (4.6 * len(panels), 4.2), 1, len(panels)) as (figure, axes):
        own = axes if len(panels) > 1 else [axes]
        for one, (basis, detail) in zip(own, panels, strict=True):
            _panel(one, record, record["accuracy"][basis][detail], at)
            what = "all questions" if detail == ALL else detail
            one.set(xlabel=label, title=f"equal {basis}, {what}")
        own[0].set_ylabel("exact match, % (95 % interval over seeds)")
        handles, labels = own[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)


def _panel(axes: Any, record: Mapping[str, Any], arms: Mapping[str, Any], at: Mapping) -> None:
    for number, (arm, by_count) in enumerate(arms.items()):
        drawn = {str(n) for n in record["experiment"]["arms"][arm]["draw"]}
        counts = [*by_count]
        places = [at[n] for n in counts]
        mean = [100 * by_count[n]["mean"] for n in counts]
        style = "--" if len(drawn) == 1 else "-"
        axes.plot(places, mean, style, color=f"C{number % 10}", linewidth=1.4, label=arm)
        if all(by_count[n]["low"] is not None for n in counts):
            low, high = ([100 * by_count[n][end] for n in counts] for end in ("low", "high"))
            axes.fill_between(places, low, high, color=f"C{number % 10}", alpha=0.12, linewidth=0)
        faces = [f"C{number % 10}" if n in drawn else "white" for n in counts]
        edges = f"C{number % 10}"
        axes.scatter(places, mean, c=faces, edgecolors=edges, s=22, zorder=3)
    axes.set_xscale("log", base=2)
    axes.set_xticks([at[n] for n in at], [f"{at[n]:.3g}" for n in at], fontsize=7)
    axes.minorticks_off()
    axes.set_ylim(-2, 102)
    axes.grid(alpha=0.3)
