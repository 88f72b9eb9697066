"""Statistics of a plan: how full and how even the packs are, who comes how often, what is left out.

Nothing is read but the index, so that an epoch of millions of samples takes seconds.
"""

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.ticker import MaxNLocator
from tqdm import tqdm

from data_pipeline.cli import add_config_arguments, at_least
from data_pipeline.corpus import Corpus, open_config
from data_pipeline.mixture import Mixture, split_ids
from data_pipeline.paths import path_argument
from data_pipeline.plan.parts import LeftOut, WindowPlan
from data_pipeline.plan.planner import Planner
from data_pipeline.plotting import BLUE, picture
from data_pipeline.settings import DataSettings
from data_pipeline.stats.advice import advice
from data_pipeline.stats.placed import Placed
from data_pipeline.text_table import text_table

_MAX_WINDOWS = 100  # of one epoch, unless --steps asks for more
_NAMED = 5


@dataclass(frozen=True)
class PlanStatistics:
    """What was planned.

    placed: the samples of the steps. taken: int64 [D], samples taken from each dataset for the
    windows of these steps. left_out: samples that fit into no pack. samples: those that were
    planned, placed or carried over, in `seconds`. complete: whether an epoch, or as many steps as
    were asked for, came out.
    """

    placed: Placed
    taken: np.ndarray
    left_out: list[LeftOut]
    samples: int
    seconds: float
    complete: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `python -m data_pipeline.stats plan`."""
    add_config_arguments(parser)
    parser.add_argument(
        "--steps",
        type=at_least(1),
        metavar="N",
        help=f"steps to plan (default: one epoch, at most {_MAX_WINDOWS} windows)",
    )
    parser.add_argument("--out", type=path_argument, metavar="STATS.png", help="write histograms")


def run(options: argparse.Namespace) -> None:
    """Plan, print a table, and write the histograms if `--out` names a file."""
    config, corpus = open_config(options.config, options.overrides)
    statistics = plan_statistics(corpus.planner, options.steps)
    for name, text in table(statistics, config.data, corpus):
        print(f"{name:<13}{text}")
    if options.out:
        plot(statistics.placed, config.data.pack.max_tokens, options.out)
        print(f"{'histograms':<13}{options.out}")


def plan_statistics(planner: Planner, steps: int | None = None) -> PlanStatistics:
    """Plan `steps` steps, or one epoch: as many samples as the mixture has.

    Raises:
        InputError: no sample fits into a pack.
    """
    windows: list[WindowPlan] = []
    planned, samples, complete = 0, 0, False
    begin = time.perf_counter()
    with tqdm(total=steps, desc="planning", unit="step", disable=None) as progress:
        for window in planner.windows():
            windows.append(window)
            planned += window.num_steps
            samples += len(window.samples)
            progress.update(window.num_steps)
            taken = sum(window.following.taken)
            complete = taken >= len(planner.mixture) if steps is None else planned >= steps
            if complete or (steps is None and len(windows) == _MAX_WINDOWS):
                break
        else:
            complete = True  # the plan has ended
    seconds = time.perf_counter() - begin
    left_out = {item.sample: item for window in windows for item in window.left_out}
    return PlanStatistics(
        placed=Placed.of(windows, steps),
        taken=np.array(windows[-1].following.taken),
        left_out=list(left_out.values()),
        samples=samples,
        seconds=seconds,
        complete=complete,
    )


def table(statistics: PlanStatistics, data: DataSettings, corpus: Corpus) -> list[tuple[str, str]]:
    """(what, text) of every line of the table."""
    placed, mixture = statistics.placed, corpus.mixture
    measures = placed.measures(data.pack.max_tokens)
    packs = placed.num_steps * placed.packs_per_step
    part = "" if statistics.complete else " (a part of an epoch; --steps plans more)"
    return [
        *_dataset_lines(statistics, mixture),
        ("planned", f"{placed.num_steps:,} steps, {packs:,} packs{part}"),
        (
            "content",
            f"{len(placed):,} samples, {placed.images.sum():,} images, {placed.tiles.sum():,} "
            f"tiles, {placed.tokens.sum():,} tokens",
        ),
        ("images at", _counts_line(placed, data)),
        *_left_out_lines(statistics, mixture),
        ("padding", f"{100 * measures.padding:.2f} %"),
        (
            "max / mean",
            f"tokens {measures.tokens_max_over_mean:.3f} (worst step "
            f"{measures.tokens_max_over_mean_worst:.3f}), tiles "
            f"{measures.tiles_max_over_mean:.3f} ({measures.tiles_max_over_mean_worst:.3f}), "
            f"attention {measures.attention_max_over_mean:.3f}",
        ),
        (
            "efficiency",
            f"{100 * measures.efficiency:.2f} % of the FLOPs' time, if ranks wait for the "
            f"slowest; {100 * measures.efficiency_bound:.2f} % can be reached",
        ),
        *([("advice", text)] if (text := advice(placed, data)) else []),
        (
            "steps alike",
            f"tiles per sample vary by {measures.tiles_per_sample_cv:.3f} over steps, "
            f"those of random steps by {measures.tiles_per_sample_cv_if_random:.3f}",
        ),
        (
            "planning",
            f"{statistics.samples:,} samples in {statistics.seconds:.2f} s, "
            f"{statistics.samples / max(statistics.seconds, 1e-9):,.0f} samples/s",
        ),
    ]


def _dataset_lines(statistics: PlanStatistics, mixture: Mixture) -> list[tuple[str, str]]:
    number = len(mixture.datasets)
    placed = np.bincount(split_ids(statistics.placed.ids)[0], minlength=number)
    rows = [("dataset", "samples", "placed", "share", "weight", "epochs")]
    rows += [
        (
            dataset.name,
            f"{len(dataset.index):,}",
            f"{placed[i]:,}",
            f"{100 * placed[i] / max(1, placed.sum()):.1f} %",
            f"{100 * mixture.weights[i]:.1f} %",
            f"{statistics.taken[i] / len(dataset.index):.2f}",
        )
        for i, dataset in enumerate(mixture.datasets)
    ]
    heads, *lines = text_table(rows).splitlines()
    return [("datasets", heads), *(("", line) for line in lines)]


def _counts_line(placed: Placed, data: DataSettings) -> str:
    if not len(placed.sides):
        return "none"
    asked = sorted(zip(data.tokens.sides, data.tokens.shares, strict=True))
    return ", ".join(
        f"{side**2} tokens {100 * (placed.sides == side).mean():.1f} % (asked for {100 * p:g} %)"
        for side, p in asked
    )


def _left_out_lines(statistics: PlanStatistics, mixture: Mixture) -> list[tuple[str, str]]:
    left_out = statistics.left_out
    names = [
        ("", f"  {mixture.name(item.sample)}: {item.tokens:,} tokens, {item.tiles} tiles at least")
        for item in left_out[:_NAMED]
    ]
    more = [("", f"  and {len(left_out) - _NAMED:,} more")] if len(left_out) > _NAMED else []
    text = f"too long for any pack: {len(left_out):,}; by the index: {len(mixture.bad):,}"
    return [("left out", text), *names, *more]


def plot(placed: Placed, max_tokens: int, out: Path) -> None:
    """Write histograms of samples and packs."""
    fill = 100 * placed.per_pack(placed.tokens).ravel() / max_tokens
    flops = placed.per_pack(placed.flops)
    spread = 100 * (flops / np.maximum(flops.mean(axis=1, keepdims=True), 1e-30) - 1)
    panels = [
        (placed.tokens, "tokens of a sample", "samples"),
        (placed.tiles, "tiles of a sample", "samples"),
        (fill, "fill of a pack, %", "packs"),
        (spread.ravel(), "FLOPs of a pack against the mean of its step, %", "packs"),
    ]
    with picture(out, (12, 7.5), 2, 2) as (figure, axes):
        for place, (values, label, of) in zip(axes.ravel(), panels, strict=True):
            place.hist(values, bins=_bins(values), color=BLUE, edgecolor="white", linewidth=0.3)
            place.set(xlabel=label, ylabel=of)
            place.yaxis.set_major_locator(MaxNLocator(integer=True))
            if values.dtype.kind == "i":
                place.xaxis.set_major_locator(MaxNLocator(integer=True))
            place.grid(axis="y", alpha=0.3)
            place.set_axisbelow(True)
        figure.suptitle(f"{len(placed):,} samples in {placed.num_steps:,} steps")


def _bins(values: np.ndarray) -> np.ndarray | int:
    """Edges between whole numbers where values are such: equal bins of fractions show combs."""
    if values.dtype.kind != "i":
        return 60
    low, high = int(values.min(initial=0)), int(values.max(initial=0))
    step = math.ceil((high - low + 1) / 60)
    return np.arange(low, high + step + 1, step) - 0.5
