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
COPY_TARGET = 0.7


def plot_measured(results: Sequence[CaseResult], device: str, out: Path) -> None:
    """Every provider, case and mode under the ceilings, and the pool + norm kernel's bandwidth."""
    figure, (overview, detail, right) = plt.subplots(
        1, 3, figsize=(20, 6.5), constrained_layout=True, width_ratios=(3, 3, 2)
    )
    points = [row for result in results for row in rows_of(result)]
    whole = [row for row in points if row["mode"] != "kernel"]
    for axes, shown in ((overview, points), (detail, whole)):
        for dtype, peaks in {result.case.dtype: result.peaks for result in results}.items():
            _draw_ceilings(axes, peaks, dtype, points)
        _draw_points(axes, shown)
    _label_roofline(overview, f"Roofline, ceilings measured in the same run ({device})")
    _label_roofline(detail, "The same, only the whole op")
    if whole:
        peak = max(result.peaks.flops for result in results) / 1e12
        detail.set_xlim(
            min(row["flops_per_byte"] for row in whole) / 1.5,
            max(row["flops_per_byte"] for row in whole) * 1.5,
        )
        detail.set_ylim(min(row["tflops"] for row in whole) / 1.5, peak * 1.5)
    _legend(overview, points)
    _draw_pool_norm(right, [row for row in points if row["mode"] == "kernel"])
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


def _label_roofline(axes: Any, title: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set(xlabel="FLOP per byte moved (calculated)", ylabel="TFLOP/s", title=title)
    axes.grid(alpha=0.3, which="both")


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


def _draw_pool_norm(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    axes.set_title("Pooling + LayerNorm kernel alone")
    axes.set(xlabel="share of the measured copy bandwidth")
    if not rows:
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
        return
    names = [_short(row["case"]) for row in rows]
    bars = axes.barh(names, [row["roofline"] for row in rows], color=COLORS["pool_norm"])
    axes.bar_label(bars, [f"{row['gb_per_s']:.0f} GB/s" for row in rows], padding=3)
    axes.axvline(COPY_TARGET, color="black", linestyle="--", label=f"target {COPY_TARGET:.0%}")
    axes.set_xlim(0, max(1.25, 1.3 * max(row["roofline"] for row in rows)))
    axes.invert_yaxis()
    axes.legend(loc="lower right")


def _short(case: str) -> str:
    return case.replace(",p=", "\np=").replace(",pool=", "\n")


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
