"""Pictures of a run, each of which answers the question that is its title."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from kernels.profile.cases import Case
from kernels.profile.results import speedup, time_ms
from kernels.profile.roofline import Peaks, steps
from kernels.profile.run_tables import LABELS

BASELINES = {"eager_grouped": "eager", "compile": "torch.compile"}
COLORS = {"eager_grouped": "C1", "compile": "C2", "save": "C0", "recompute": "C4", "fused": "C3"}
ASKED = {"both": "a forward and backward", "forward": "a forward", "backward": "a backward"}
KINDS = ("matrix products", "pooling, norm", "SwiGLU", "the rest")


def draw(content: dict[str, Any], out: Path) -> list[Path]:
    """All pictures for which the run has something to show."""
    named = {record["case"]: record for record in content["cases"]}
    swept = {name for sweep in content.get("sweeps", ()) for name in sweep["cases"]}
    plain = [record for name, record in named.items() if name not in swept]
    drawn = [_speedups(plain, content, out), _parts(plain, content, out)] if plain else []
    for sweep in content.get("sweeps", ()):
        records = [named[name] for name in sweep["cases"] if name in named]
        if len(records) > 1:
            drawn += _sweep(sweep, records, content, out)
    return [path for path in drawn if path]


def _axes(
    title: str, content: dict[str, Any], size: tuple[float, float], what: str = ""
) -> tuple[Any, Any]:
    figure, axes = plt.subplots(figsize=size, constrained_layout=True)
    peaks = content["cases"][0]["peaks"]
    source = content["machine"]["device"]
    if content["kind"] == "calculated":
        source = (
            f"calculated, not timed: {peaks['flops'] / 1e12:.3g} TFLOP/s, "
            f"{peaks['bandwidth'] / 1e12:.3g} TB/s"
        )
    axes.set_title(f"{title}\n", fontweight="bold", loc="left")
    axes.text(0, 1.02, f"{what}{source}", transform=axes.transAxes, fontsize=9, color="0.4")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, axes: Any, path: Path) -> Path:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _mode(records: Sequence[dict[str, Any]]) -> str:
    """The most of forward and backward that any record has times of."""
    found = {m for r in records for p in r["providers"].values() for m in p["timings"]}
    return next((mode for mode in ("both", "backward", "forward") if mode in found), "both")


def _label(name: str) -> str:
    """A case's name in short lines."""
    return "\n".join(textwrap.wrap(name.replace(",", ", "), 36))


def _speedups(records: Sequence[dict[str, Any]], content: dict[str, Any], out: Path) -> Path | None:
    """Bars of save over the baselines, forward and backward, with the run's own noise."""
    title = "How many times as fast as eager PyTorch and torch.compile is this op?"
    mode = _mode(records)
    shown = [r for r in records if any(speedup(r, other, "save", mode) for other in BASELINES)]
    if not shown:
        return None
    figure, axes = _axes(title, content, (10, 1.6 + 0.7 * len(shown)))
    for j, (other, label) in enumerate(BASELINES.items()):
        found = [(i, speedup(r, other, "save", mode), r) for i, r in enumerate(shown)]
        found = [(i, ratio, r) for i, ratio, r in found if ratio]
        noise = [ratio * abs(r.get("noise", {}).get(mode, 1) - 1) for _, ratio, r in found]
        bars = axes.barh(
            [i + 0.35 * j for i, *_ in found],
            [ratio for _, ratio, _ in found],
            0.33,
            xerr=noise if any(noise) else None,
            color=COLORS[other],
            label=f"over {label}",
        )
        axes.bar_label(bars, [f"{ratio:.2f}x" for _, ratio, _ in found], padding=6, fontsize=9)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(
        [i + 0.17 for i in range(len(shown))], [_label(r["case"]) for r in shown], fontsize=9
    )
    axes.invert_yaxis()
    axes.margins(x=0.12)
    lines = "; lines at the ends: A/A of the run" if content["kind"] == "measured" else ""
    axes.set_xlabel(f"times as fast, {LABELS[mode]}{lines}")
    return _save(figure, axes, out / "speedup.png")


def _parts(records: Sequence[dict[str, Any]], content: dict[str, Any], out: Path) -> Path | None:
    """The op's time by kind of kernel: as traced, or the floors of its steps."""
    shown = [(r["case"], parts) for r in records if sum(parts := _kinds(r))]
    if not shown:
        return None
    title = "Where does the time of one forward and backward of this op go?"
    figure, axes = _axes(title, content, (10, 1.6 + 0.7 * len(shown)))
    left, totals = [0.0] * len(shown), [sum(parts) for _, parts in shown]
    for i, label in enumerate([*KINDS, "no kernel runs (traced)"][: len(shown[0][1])]):
        shares = [100 * parts[i] / total for (_, parts), total in zip(shown, totals, strict=True)]
        bars = axes.barh(range(len(shown)), shares, left=left, label=label, color=f"C{i}")
        texts = [f"{share:.0f}" if share > 4 else "" for share in shares]
        axes.bar_label(bars, texts, label_type="center", fontsize=8, color="white")
        left = [a + b for a, b in zip(left, shares, strict=True)]
    names = [_label(f"{n},{us:.0f}us") for (n, _), us in zip(shown, totals, strict=True)]
    axes.set_yticks(range(len(shown)), names, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("% of the time")
    return _save(figure, axes, out / "parts.png")


def _kinds(record: dict[str, Any]) -> list[float]:
    """Microseconds by `KINDS`, and between kernels where that was measured."""
    found = record["providers"].get("save", {})
    if kernels := found.get("kernels"):
        times = [(k["name"], k["us"], k["tflops"] is not None) for k in kernels["kernels"]]
    elif "repeated" in record:
        return []  # measured, without traces
    else:
        case, peaks = Case.of(record["shape"]), Peaks(**record["peaks"]).past_l2
        each = steps(case, "cublas", "both", record["frozen"])
        times = [(s.name, 1e6 * s.floor_s(peaks), s.flops > 0) for s in each]
    sums = [0.0] * len(KINDS)
    for name, us, product in times:
        norm = any(part in name for part in ("pool", "norm"))
        swiglu = any(part in name for part in ("swiglu", "silu", "sigmoid", "mul"))
        sums[0 if product else 1 if norm else 2 if swiglu else 3] += us
    return [*sums, kernels["gap_us"]] if kernels else sums


def _sweep(
    sweep: dict[str, Any], records: Sequence[dict[str, Any]], content: dict[str, Any], out: Path
) -> list[Path]:
    """Lines over the values of one key: time, speed-up, and the host's share of it."""
    key, others = sweep["key"], sweep["rest"]
    values = [sweep["values"][sweep["cases"].index(record["case"])] for record in records]
    mode = _mode(records)
    names = dict.fromkeys(name for r in records for name in r["providers"])
    times = {n: [time_ms(r, n, mode) for r in records] for n in names}
    ratios = {
        f"over {label}": [speedup(r, other, "save", mode) for r in records]
        for other, label in BASELINES.items()
    }
    hosts = {  # none where the host is the device, or nothing was timed
        n: [_ratio(time_ms(r, n, mode, "host_ms"), time_ms(r, n, mode)) for r in records]
        for n in names
        if content["machine"]["device"] != "cpu"
    }
    colors = dict(zip(ratios, (COLORS[other] for other in BASELINES), strict=True)) | COLORS
    plots = (
        ("time", f"How long does {ASKED[mode]} take?", times, "milliseconds", None),
        ("speedup", "How many times as fast is this op?", ratios, "times as fast", 1.0),
        (
            *("host", "Where is the host the limit?", hosts),
            *("host's time to issue a call / time of the call", 1.0),
        ),
    )
    drawn = []
    for name, question, series, unit, line in plots:
        if not any(value for column in series.values() for value in column):
            continue
        figure, axes = _axes(question, content, (9, 4.5), f"{others}, {LABELS[mode]};  ")
        for label, column in series.items():
            if any(column):
                heights = [float("nan") if v is None else v for v in column]
                axes.plot(values, heights, ".-", label=label, color=colors.get(label))
        if line:
            axes.axhline(line, color="black", linewidth=1)
        if name == "host":
            axes.axhspan(
                1, max(1.3, axes.get_ylim()[1]), color="0.92", label="the host is the limit"
            )
        if values[-1] >= 4 * values[0] and key != "n":
            axes.set_xscale("log", base=2)
            axes.set_xticks(values, values)
        if name != "speedup":
            axes.set_yscale("log")
        axes.set(xlabel=key, ylabel=unit)
        axes.grid(alpha=0.3)
        drawn.append(_save(figure, axes, out / f"sweep-{key}-{name}.png"))
    return drawn


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None
