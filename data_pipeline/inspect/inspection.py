"""Gathers what the page shows: plans, chooses samples, and builds their packs."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from data_pipeline.corpus import Corpus
from data_pipeline.errors import InputError
from data_pipeline.inspect.views import PackView, SampleView, ViewBuilder
from data_pipeline.plan import LeftOut, PackPlan, Planner, StepPlan, WindowPlan
from data_pipeline.settings import DataConfig
from data_pipeline.stats.placed import Placed


@dataclass(frozen=True)
class InspectSettings:
    """What to show: steps from `first_step` on, counted from 1; at most so many packs of each."""

    first_step: int = 1
    steps: int = 2
    packs: int = 16
    samples: int = 12


@dataclass(frozen=True)
class PlannedSteps:
    """The steps to show and their surroundings.

    shown: steps with their numbers, from 1. around: all steps of `windows`, those that hold the
    steps shown; placed: their samples. left_out: samples met up to there that fit into no pack.
    """

    shown: list[tuple[int, StepPlan]]
    around: list[tuple[int, StepPlan]]
    windows: list[WindowPlan]
    placed: Placed
    left_out: list[LeftOut]


@dataclass(frozen=True)
class StepView:
    """A step: its first packs as built; `tokens`, `tiles`, `flops` [P] of all packs, as planned."""

    number: int
    window: int
    packs: list[PackView]
    tokens: np.ndarray
    tiles: np.ndarray
    flops: np.ndarray


@dataclass(frozen=True)
class Inspection:
    """Everything that the page shows.

    samples: the good ones of those chosen, in order. built: samples of all packs that were built.
    failed: (name, reason) of those of them that could not be used.
    """

    config: DataConfig
    corpus: Corpus
    planned: PlannedSteps
    steps: list[StepView]
    samples: list[SampleView]
    built: int
    failed: list[tuple[str, str]]


def inspect_plan(config: DataConfig, corpus: Corpus, settings: InspectSettings) -> Inspection:
    """Plan, build, and gather.

    Raises:
        InputError: the plan ends before the first step to show.
    """
    planned = plan_steps(corpus.planner, settings.first_step, settings.steps)
    views = ViewBuilder(corpus.mixture, corpus.builder, corpus.tokenizer, config.data.tiling)
    drawn = {
        (number, pack): plan
        for number, step in planned.shown
        for pack, plan in enumerate(step.packs[: settings.packs])
    }
    all_packs = drawn | {
        (number, pack): plan
        for number, step in planned.around
        for pack, plan in enumerate(step.packs)
    }
    chosen = choose_samples(all_packs, settings.samples, views)
    to_build = drawn | {place[:2]: all_packs[place[:2]] for place in chosen}
    wanted = {place: {p[2] for p in chosen if p[:2] == place} for place in to_build}

    def build(place: tuple[int, int]) -> PackView:
        return views.view(*place, to_build[place], wanted[place])

    with ThreadPoolExecutor(config.data.loader.threads) as pool:
        packs = pool.map(build, to_build)
        bar = tqdm(packs, "building packs", len(to_build), unit="pack", disable=None)
        built = dict(zip(to_build, bar, strict=True))
    samples = [built[step, pack].samples[place] for step, pack, place in chosen]
    return Inspection(
        config=config,
        corpus=corpus,
        planned=planned,
        steps=[
            _step_view(number, step, [built[number, p] for n, p in drawn if n == number])
            for number, step in planned.shown
        ],
        samples=[sample for sample in samples if not sample.reason],
        built=sum(len(pack.segments) for pack in built.values()),
        failed=[bad for pack in built.values() for bad in pack.bad],
    )


def plan_steps(planner: Planner, first: int, count: int) -> PlannedSteps:
    """Plan from the beginning up to the steps first .. first + count - 1, counted from 1."""
    kept: list[tuple[int, WindowPlan]] = []
    left_out: dict[int, LeftOut] = {}
    number = 1
    with tqdm(desc="planning", unit="step", disable=None) as progress:
        for window in planner.windows():
            left_out |= {item.sample: item for item in window.left_out}
            if number + window.num_steps > first:
                kept.append((number, window))
            number += window.num_steps
            progress.update(window.num_steps)
            if number >= first + count:
                break
    if not kept:
        raise InputError(f"--first-step is {first}, but the plan ends after step {number - 1}")
    around = [
        (begin + offset, step)
        for begin, window in kept
        for offset, (step, _) in enumerate(window.steps())
    ]
    shown = [(n, step) for n, step in around if first <= n < first + count]
    windows = [window for _, window in kept]
    return PlannedSteps(shown, around, windows, Placed.of(windows), list(left_out.values()))


def choose_samples(
    packs: dict[tuple[int, int], PackPlan], count: int, views: ViewBuilder
) -> list[tuple[int, int, int]]:
    """Places (step, pack, place in the pack) of samples as unlike each other as they can be.

    One after another the sample is taken whose dataset, kind, number of images and tiles, and token
    count have been shown least so far; among equals the first.
    """
    alike: dict[tuple, list[tuple[int, int, int]]] = {}
    for (step, pack), plan in packs.items():
        for place, sample in enumerate(plan.sample_ids.tolist()):
            traits = _traits(sample, plan, place, views)
            same = alike.setdefault(traits, [])
            if len(same) < count:
                same.append((step, pack, place))
    shown: Counter[object] = Counter()
    chosen: list[tuple[int, int, int]] = []
    while len(chosen) < count and any(alike.values()):
        traits = max(
            (traits for traits, places in alike.items() if places),
            key=lambda traits: sum(1 / (1 + shown[trait]) for trait in (*traits, traits)),
        )
        shown.update((*traits, traits))
        chosen.append(alike[traits].pop(0))
    return chosen


def _traits(sample: int, plan: PackPlan, place: int, views: ViewBuilder) -> tuple:
    sides, tiles = plan.sides[place], plan.tiles[place]
    return (
        ("dataset", views.mixture.dataset(sample)),
        ("kind", views.kind(sample)),
        ("images", min(len(sides), 3)),
        ("tiles", int(tiles.max(initial=0))),
        ("sides", tuple(sorted(set(sides.tolist())))),
    )


def _step_view(number: int, step: StepPlan, packs: list[PackView]) -> StepView:
    return StepView(
        number=number,
        window=step.window,
        packs=packs,
        tokens=np.array([pack.tokens for pack in step.packs]),
        tiles=np.array([pack.num_tiles for pack in step.packs]),
        flops=np.array([pack.flops for pack in step.packs]),
    )
