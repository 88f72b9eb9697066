"""Lines over the steps of runs, each chart answering the question of its title."""

import base64
import math
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.ticker import LogLocator

from data_pipeline.plotting import picture
from training.metrics.run_curve import smooth
from training.report.run_facts import Row, RunFacts

Points = tuple[list[float], list[float]]
Series = dict[str, Points]
_MOST_POINTS = 1500
_RATES = (
    ("tokens_per_s", "How many tokens a second?", "tokens/s"),
    ("images_per_s", "How many images a second?", "images/s"),
    ("mfu", "What part of the GPUs' peak does the model use?", "MFU, %"),
    ("step_s", "How long does a step take?", "seconds"),
    ("data_wait", "What part of a step waits for data?", "% of the step"),
    ("padding", "What part of the packs holds nothing?", "% of the packs' room"),
    ("memory_gib", "How much memory does the fullest rank use?", "GiB"),
)
_PERCENT = ("mfu", "data_wait", "padding")


def charts(runs: list[RunFacts]) -> list[tuple[str, str]]:
    """(section, picture as data URI) of all that the runs have on record."""
    found = [("losses", _chart("How does the loss fall?", _losses(runs), "loss", log=True))]
    if datasets := _by_key(runs, "loss_dataset_"):
        title = "How does the loss of each data set fall?"
        found.append(("losses", _chart(title, datasets, "loss", log=True)))
    if history := _history(runs):
        title = "How does held-out accuracy rise?"
        found.append(("accuracy", _chart(title, history, "exact match, %", marker="o")))
    if by_count := _by_count(runs):
        title = "What do more tokens buy, at the last evaluation?"
        found.append(
            ("accuracy", _chart(title, by_count, "exact match, %", "tokens per tile", "o"))
        )
    for key, title, unit in _RATES:
        factor = 100 if key in _PERCENT else 1
        if lines := _lines(runs, key, factor):
            found.append(("speed", _chart(title, lines, unit)))
    if apart := _apart(runs):
        title = "How far apart are the slowest and the fastest rank?"
        found.append(("speed", _chart(title, apart, "ms")))
    for key, title in (
        ("grad_norm", "How large are the gradients?"),
        ("lr", "How fast is it learning?"),
    ):
        unit = {"grad_norm": "norm before clipping", "lr": "largest learning rate"}[key]
        found.append(("optimizer", _chart(title, _lines(runs, key, 1), unit)))
    return found


def _losses(runs: list[RunFacts]) -> Series:
    """The loss; of one run also by token count."""
    series = _by_run(runs, lambda run: _points(run.rows, "loss"))
    if len(runs) == 1:
        series = {"all": series[runs[0].name]}
        counts = sorted(int(key[5:]) for key in runs[0].keys("loss_") if key[5:].isdigit())
        series |= {f"{count} tokens": _points(runs[0].rows, f"loss_{count}") for count in counts}
    return {name: (x, smooth(y)) for name, (x, y) in series.items()}


def _by_key(runs: list[RunFacts], prefix: str) -> Series:
    return {
        _label(runs, run, key.removeprefix(prefix)): (points[0], smooth(points[1]))
        for run in runs
        for key in run.keys(prefix)
        if (points := _points(run.rows, key))[0]
    }


def _history(runs: list[RunFacts]) -> Series:
    """Accuracy at each evaluation, by token count; nothing where there was only one."""
    series: Series = defaultdict(lambda: ([], []))
    for run in runs:
        for row in run.evaluations if len(run.evaluations) > 1 else []:
            for result in _overall(row):
                label = _label(runs, run, f"{result['num_image_tokens']} tokens")
                series[label][0].append(row["step"])
                series[label][1].append(100 * result["accuracy"])
    return dict(series)


def _by_count(runs: list[RunFacts]) -> Series:
    """Accuracy at the last evaluation over the token counts."""
    series = {}
    for run in runs:
        results = _overall(run.evaluations[-1]) if run.evaluations else []
        points = sorted((r["num_image_tokens"], 100 * r["accuracy"]) for r in results)
        if points:
            series[run.name] = ([float(x) for x, _ in points], [y for _, y in points])
    return series


def _overall(row: Row) -> list[Row]:
    return [result for result in row["results"] if result["detail"] == "all"]


def _apart(runs: list[RunFacts]) -> Series:
    def points(run: RunFacts) -> Points:
        rows = [row for row in run.rows if "slowest_rank_s" in row and "fastest_rank_s" in row]
        apart = [1000 * (row["slowest_rank_s"] - row["fastest_rank_s"]) for row in rows]
        return [float(row["step"]) for row in rows], apart

    return _by_run(runs, points)


def _lines(runs: list[RunFacts], key: str, factor: float) -> Series:
    return _by_run(runs, lambda run: _points(run.rows, key, factor))


def _by_run(runs: list[RunFacts], points_of: Callable[[RunFacts], Points]) -> Series:
    found = {run.name: points_of(run) for run in runs}
    return {name: points for name, points in found.items() if points[0]}


def _label(runs: list[RunFacts], run: RunFacts, text: str) -> str:
    return text if len(runs) == 1 else f"{run.name}: {text}"


def _points(rows: Sequence[Row], key: str, factor: float = 1) -> Points:
    """Steps and finite values, means of neighbours where there are very many."""
    found = [
        (float(row["step"]), factor * row[key])
        for row in rows
        if isinstance(row.get(key), int | float) and math.isfinite(row[key])
    ]
    size = math.ceil(len(found) / _MOST_POINTS) or 1
    groups = [found[start : start + size] for start in range(0, len(found), size)]
    return (
        [group[-1][0] for group in groups],
        [sum(value for _, value in group) / len(group) for group in groups],
    )


def _chart(
    title: str, series: Series, unit: str, over: str = "step", marker: str = "", log: bool = False
) -> str:
    """A PNG as data URI."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "chart.png"
        with picture(out, (6.4, 3.4)) as (_, axes):
            for name, (x, y) in series.items():
                axes.plot(x, y, label=name, marker=marker or None, linewidth=1.3)
            if log and all(value > 0 for _, y in series.values() for value in y):
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_major_formatter("{x:g}")
                axes.minorticks_off()
            elif not log and series:
                axes.set_ylim(bottom=0)
            axes.set(xlabel=over, ylabel=unit, title=title)
            axes.grid(alpha=0.3)
            if len(series) > 1:
                axes.legend(fontsize="small")
        return f"data:image/png;base64,{base64.b64encode(out.read_bytes()).decode()}"
