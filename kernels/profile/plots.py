"""The roofline as a picture: measured on a GPU, or calculated and labelled so."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from kernels.profile.bench import CaseResult
from kernels.profile.cases import Case
from kernels.profile.providers import PROVIDERS
from kernels.profile.results import rows_of
from kernels.profile.roofline import MODES, WAYS, Peaks, steps
from kernels.profile.text_report import LABELS

MARKERS = {"forward": "o", "backward": "s", "both": "D", "kernel": "*"}
COLORS = {name: f"C{i}" for i, name in enumerate((*PROVIDERS, "pool_norm"))}  # of 10


def plot_measured(results: Sequence[CaseResult], device: str, out: Path) -> None:
    """Every provider, case and mode, and the pool + norm kernel, under the ceilings."""
    figure, axes = plt.subplots(figsize=(11, 7), constrained_layout=True)
    points = [row for result in results for row in rows_of(result)]
    for dtype, peaks in {result.case.dtype: result.peaks for result in results}.items():
        _draw_ceilings(axes, peaks, dtype, points)
    _draw_points(axes, points)
    axes.set(xlabel="FLOP per byte moved (calculated)", ylabel="TFLOP/s", xscale="log")
    axes.set(yscale="log", title=f"Roofline, ceilings measured in the same run ({device})")
    axes.grid(alpha=0.3, which="both")
    _legend(axes, points)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def _draw_points(axes: Any, points: Sequence[dict[str, Any]]) -> None:
    for row in points:
        color = COLORS[row["provider"]]
        axes.plot(
            row["flops_per_byte"],
            row["tflops"],
            MARKERS[row["mode"]],
            color=color,
            markerfacecolor=color if row["pool"] == "adaptive" else "white",
            markersize=12 if row["mode"] == "kernel" else 6,
        )


def _draw_ceilings(axes: Any, peaks: Peaks, dtype: str, points: Sequence[dict[str, Any]]) -> None:
    low = min([1.0, *(row["flops_per_byte"] / 2 for row in points)])
    high = max([4 * peaks.flops / peaks.bandwidth, *(2 * row["flops_per_byte"] for row in points)])
    intensity = np.geomspace(low, high, 400)
    ceiling = np.minimum(peaks.flops, peaks.bandwidth * intensity) / 1e12
    axes.plot(intensity, ceiling, color="black", linewidth=1.5)
    knee = peaks.flops / peaks.bandwidth
    axes.annotate(
        f"{dtype} matrix product {peaks.flops / 1e12:.3g} TFLOP/s",
        (high, peaks.flops / 1e12),
        (0, 5),
        textcoords="offset points",
        ha="right",
        annotation_clip=True,
    )
    at = (low * knee) ** 0.5
    axes.annotate(
        f"copy {peaks.bandwidth / 1e12:.3g} TB/s",
        (at, peaks.bandwidth * at / 1e12),
        (-8, 4),
        textcoords="offset points",
        ha="right",
        annotation_clip=True,
    )


def _legend(axes: Any, points: Sequence[dict[str, Any]]) -> None:
    """Colour is the provider, shape the mode, hollow any mode but adaptive."""
    entries = [
        plt.Line2D([], [], color=COLORS[name], marker="o", linestyle="", label=name)
        for name in dict.fromkeys(row["provider"] for row in points)
    ]
    entries += [
        plt.Line2D(
            [], [], color="black", marker=MARKERS[mode], linestyle="", label=LABELS.get(mode, mode)
        )
        for mode in dict.fromkeys(row["mode"] for row in points)
    ]
    if hollow := {row["pool"] for row in points} - {"adaptive"}:
        entries.append(
            plt.Line2D(
                *([], []),
                color="black",
                marker="o",
                markerfacecolor="white",
                linestyle="",
                label=f"hollow: {', '.join(sorted(hollow))}",
            )
        )
    axes.legend(handles=entries, fontsize=8, loc="lower right")


def plot_calculated(cases: Sequence[Case], peaks: Peaks, frozen: bool, out: Path) -> None:
    """Floors of each way, split into matrix products and the rest; nothing in it was timed."""
    figure, all_axes = plt.subplots(
        1, 3, figsize=(15, 1.5 + 1.05 * len(cases)), constrained_layout=True, sharey=True
    )
    for axes, mode in zip(all_axes, MODES, strict=True):
        _draw_floors(axes, cases, peaks, frozen, mode)
    all_axes[0].legend(loc="upper right")
    figure.suptitle(
        "Calculated, not timed: the least time at "
        f"{peaks.flops / 1e12:.4g} TFLOP/s and {peaks.bandwidth / 1e12:.3g} TB/s (assumed)"
    )
    figure.savefig(out, dpi=120)
    plt.close(figure)


def _draw_floors(axes: Any, cases: Sequence[Case], peaks: Peaks, frozen: bool, mode: str) -> None:
    places, gemms, others = [], [], []
    for i, case in enumerate(cases):
        first = i * (len(WAYS) + 1)
        axes.text(0.0, first - 0.55, case.name, fontsize=8, va="bottom", fontweight="bold")
        for j, way in enumerate(WAYS):
            floors = [(step.flops, step.floor_s(peaks)) for step in steps(case, way, mode, frozen)]
            places.append(first + j)
            gemms.append(1e6 * sum(seconds for flops, seconds in floors if flops))
            others.append(1e6 * sum(seconds for flops, seconds in floors if not flops))
    axes.barh(places, gemms, color="tab:blue", label="matrix products")
    bars = axes.barh(places, others, left=gemms, color="tab:orange", label="memory passes")
    totals = [gemm + other for gemm, other in zip(gemms, others, strict=True)]
    axes.bar_label(bars, [f"{total:.0f}" for total in totals], padding=2, fontsize=8)
    axes.set_yticks(places, WAYS * len(cases), fontsize=8)
    axes.set(title=LABELS[mode], xlabel="microseconds", xlim=(0, 1.15 * max(totals)))
    axes.set_ylim((len(WAYS) + 1) * len(cases) - 0.6, -1.4)
