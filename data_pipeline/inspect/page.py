"""The report as one HTML file: no script, nothing loaded from elsewhere, all data escaped."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.html_page import page_environment
from data_pipeline.inspect import charts
from data_pipeline.inspect.content import visible
from data_pipeline.inspect.inspection import Inspection, StepView
from data_pipeline.mixture import split_ids

_MAX_ROWS = 20_000
"""Rows of a table; more are counted only, browsers give up on them."""


def render(report: Inspection, title: str) -> str:
    """The whole page; `title` names the config."""
    environment = page_environment(Path(__file__).parent)
    environment.filters["visible"] = visible
    environment.globals.update(grid_lines=charts.grid_lines, tile_lines=charts.tile_lines)
    left_out = _left_out_by_index(report)
    return environment.get_template("page.html.j2").render(
        title=title,
        data=report.config.data,
        seed=report.config.seed,
        tokenizer=report.corpus.tokenizer,
        totals=_totals(report),
        datasets=_datasets(report),
        steps=[(step, _spread(step)) for step in report.steps],
        samples=report.samples,
        window=_window(report),
        index_bad=left_out[:_MAX_ROWS],
        num_index_bad=len(left_out),
        faults=Counter(bad.fault for _, bad in left_out).most_common(),
        no_pack=[
            (report.corpus.mixture.name(item.sample), item)
            for item in report.planned.left_out[:_MAX_ROWS]
        ],
        num_no_pack=len(report.planned.left_out),
        failed=sorted(set(report.failed)),
        num_built=report.built,
    )


def _totals(report: Inspection) -> list[tuple[str, int]]:
    totals: Counter[str] = Counter()
    for dataset in report.corpus.mixture.datasets:
        totals.update(dataset.index.totals)
        totals["shards"] += len(dataset.index.shards)
        totals["left out by the index"] += len(dataset.index.bad)
    names = ("samples", "images", "text_tokens", "supervised_tokens", "shards")
    return [
        *((name.replace("_", " "), totals[name]) for name in names),
        ("left out by the index", totals["left out by the index"]),
    ]


def _datasets(report: Inspection) -> list[dict[str, Any]]:
    """A row per dataset; epochs when the first window shown began."""
    mixture, windows = report.corpus.mixture, report.planned.windows
    placed = split_ids(report.planned.placed.ids)[0]
    taken = np.bincount(placed, minlength=len(mixture.datasets))
    return [
        {
            "name": dataset.name,
            "totals": dataset.index.totals,
            "shards": len(dataset.index.shards),
            "bad": len(dataset.index.bad),
            "weight": float(mixture.weights[number]),
            "share": taken[number] / max(1, taken.sum()),
            "repeat": dataset.repeat,
            "epochs": windows[0].epochs[number],
        }
        for number, dataset in enumerate(mixture.datasets)
    ]


def _spread(step: StepView) -> list[tuple[str, float, float]]:
    """(what, max, mean) over all packs of a step, as planned."""
    quantities = (("tokens", step.tokens), ("tiles", step.tiles), ("FLOPs", step.flops))
    return [(name, float(v.max()), float(v.mean())) for name, v in quantities]


def _window(report: Inspection) -> dict[str, Any]:
    """Numbers and histograms of the windows that hold the steps shown."""
    placed, data = report.planned.placed, report.config.data
    fill = 100 * placed.per_pack(placed.tokens).ravel() / data.pack.max_tokens
    return {
        "windows": [window.state.window for window in report.planned.windows],
        "steps": placed.num_steps,
        "packs": fill.size,
        "samples": len(placed),
        "images": int(placed.images.sum()),
        "tokens": int(placed.tokens.sum()),
        "tiles": int(placed.tiles.sum()),
        "padding": 1 - float(fill.mean()) / 100,
        "charts": [
            ("Tokens of a sample", *_chart(placed.tokens, "tokens")),
            ("Tiles of a sample", *_chart(placed.tiles, "tiles", 0)),
            # From a round tenth on: full packs would be a single bar.
            ("Fill of a pack, %", *_chart(fill, "%", min(90, fill.min() // 10 * 10), 100)),
        ],
        "counts": [
            (side**2, side, int((placed.sides == side).sum()), probability)
            for side, probability in sorted(zip(data.tokens.sides, data.tokens.shares, strict=True))
        ],
    }


def _chart(
    values: np.ndarray, unit: str, low: float | None = None, high: float | None = None
) -> tuple[Any, str]:
    """(drawing, summary)."""
    if not len(values):
        return charts.histogram(values, unit), ""
    middle, top = np.median(values), values.max()
    summary = f"median {middle:,.4g} · mean {values.mean():,.4g} · largest {top:,.4g}"
    return charts.histogram(values, unit, low, high), summary


def _left_out_by_index(report: Inspection) -> list[tuple[str, Any]]:
    datasets = report.corpus.mixture.datasets
    return [(dataset.name, bad) for dataset in datasets for bad in dataset.index.bad]
