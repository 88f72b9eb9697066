"""Where the time went, as a picture: one bar per process, and one for the whole run."""

from pathlib import Path

from matplotlib.patches import Rectangle

from data_pipeline.plotting import picture
from training.goodput.accounting import ALL_PARTS, Summary, duration

_MOST_BARS = 20
_COLORS = {
    "steps": "#2a9d5c",
    "data_wait": "#e9b949",
    "checkpoint_stall": "#3d7ebf",
    "evaluation": "#7fb7e6",
    "startup": "#b9a3d0",
    "restart": "#8c8c8c",
    "lost": "#c8453b",
    "other": "#d9d9d9",
}


def plot(summary: Summary, out: Path) -> None:
    """Write a PNG of the share of each part; of many processes, the newest."""
    processes = summary.processes[-_MOST_BARS:]
    first = len(summary.processes) - len(processes) + 1
    bars = [("whole run", summary.seconds, "")]
    bars += [(f"start {first + i}", p.seconds, f", {p.reason}") for i, p in enumerate(processes)]
    parts = [part for part in ALL_PARTS if summary.seconds[part] > 0]
    size = (10, 1.8 + 0.38 * len(bars))
    with picture(out, size, bbox_inches="tight") as (figure, axes):
        for row, (_, seconds, ended) in enumerate(bars):
            wall = sum(seconds.values()) or 1.0
            left = 0.0
            for part in parts:
                share = 100 * seconds[part] / wall
                axes.barh(row, share, left=left, color=_COLORS[part], height=0.72)
                if share >= 6:
                    axes.text(left + share / 2, row, f"{share:.0f}%", ha="center", va="center")
                left += share
            axes.text(101, row, f"{duration(wall)}{ended}", va="center")
        handles = [Rectangle((0, 0), 1, 1, color=_COLORS[part]) for part in parts]
        names = [part.replace("_", " ") for part in parts]
        figure.legend(handles, names, loc="outside lower center", ncols=len(parts), frameon=False)
        axes.set_yticks(range(len(bars)), [name for name, _, _ in bars])
        axes.invert_yaxis()
        axes.set(xlim=(0, 100), xlabel="share of the wall time, %")
        axes.set_title(f"Goodput {summary.goodput:.1%}")
        axes.spines[["top", "right"]].set_visible(False)
