"""What the runs of all arms come to: rates, memory, loss; least, median and most over rounds."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from data_pipeline.text_table import text_table
from training.bench.arms import ARMS, OURS
from training.bench.rounds import Runs

MEASURES = {
    "samples_per_s": "samples/s",
    "supervised_per_s": "supervised tokens/s",
    "memory_gib": "GiB",
    "loss_after": "held-out loss",
}
_ROUNDING = 1e-4
"""Largest relative difference of what all arms score with the weights they start from."""


def compare(runs: Runs, warmup: int) -> dict[str, Any]:
    """Per arm the measures of every round with their extremes, and ratios to this trainer.

    warmup: first steps that count for no rate.

    Raises:
        RuntimeError: the arms did not train the same samples from the same weights.
    """
    check_equal(runs)
    arms = {
        name: {
            "says": ARMS[name].says,
            **_spread([measured(run, warmup) for run in own]),
            "curve": curve(own[0]),
        }
        for name, own in runs.items()
    }
    found: dict[str, Any] = {"arms": arms}
    if OURS in arms:
        rates = {name: arm["samples_per_s"]["rounds"] for name, arm in arms.items()}
        found["times_as_fast_as"] = {
            name: _extremes([a / b for a, b in zip(rates[OURS], own, strict=True)])
            for name, own in rates.items()
            if name != OURS
        }
    return found


def check_equal(runs: Runs) -> None:
    """RuntimeError unless all runs trained the same samples, once each, from the same weights."""
    first, *others = [(name, run) for name, own in runs.items() for run in own]
    for name, run in others:
        if trained(run) != trained(first[1]):
            raise RuntimeError(f"{name} trained other samples than {first[0]}")
        before, expected = run["held_out_before"], first[1]["held_out_before"]
        if abs(before - expected) > _ROUNDING * expected:
            raise RuntimeError(f"{name} started at a loss of {before}, {first[0]} at {expected}")


def trained(run: Mapping[str, Any]) -> list[int]:
    """Ids of all samples of a run, as often as they were trained."""
    return sorted(sample for step in run["steps"] for sample in step["samples"])


def measured(run: Mapping[str, Any], warmup: int) -> dict[str, float]:
    """The measures of one run; rates are from the end of its warm-up to the end of its last step.

    overhead: what is neither forward, backward nor optimizer, of that time.
    """
    steps, kept = run["steps"], run["steps"][warmup:]
    seconds = kept[-1]["end"] - (steps[warmup - 1]["end"] if warmup else run["began"])
    found = {
        "samples_per_s": sum(len(step["samples"]) for step in kept) / seconds,
        "supervised_per_s": sum(step["supervised"] for step in kept) / seconds,
        "memory_gib": run["memory_gib"],
        "loss_before": run["held_out_before"],
        "loss_after": run["held_out_after"],
        "steps": len(steps),
        "padding": 1 - sum(s["tokens"] for s in steps) / sum(s["slots"] for s in steps),
    }
    for name, part in (("overhead", "compute"), ("data_wait", "wait")):
        if all(step[part] is not None for step in kept):
            share = sum(step[part] for step in kept) / seconds
            found[name] = 1 - share if name == "overhead" else share
    return found


def curve(run: Mapping[str, Any]) -> dict[str, list[float]]:
    """The mean loss of each step's supervised tokens, by samples trained at its end."""
    samples, total = [], 0
    for step in run["steps"]:
        total += len(step["samples"])
        samples.append(total)
    return {"samples": samples, "loss": [round(step["loss"], 5) for step in run["steps"]]}


def table(found: Mapping[str, Any]) -> str:
    """Least, median and most of every measure, an arm a row."""
    ratios = found.get("times_as_fast_as", {})
    rows = [["arm", *MEASURES.values(), "padding", "this trainer / it"]]
    for name, arm in found["arms"].items():
        row = [name, *(_cell(arm[measure]) for measure in MEASURES)]
        row.append(f"{arm['padding']['median']:.1%}")
        rows.append([*row, _cell(ratios[name]) if name in ratios else ""])
    ours = found["arms"].get(OURS)
    text = text_table(rows)
    if ours:
        shares = [f"{name} {ours[name]['median']:.2%}" for name in ("overhead", "data_wait")]
        text += f"\nthis trainer: {', '.join(shares)} of the time (median)".replace("_", " ")
    return text + "\nleast / median / most of the rounds"


def _cell(spread: Mapping[str, Any]) -> str:
    return " / ".join(f"{spread[key]:.4g}" for key in ("least", "median", "most"))


def _spread(rounds: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    return {key: _extremes([row[key] for row in rounds]) for key in rounds[0]}


def _extremes(values: Sequence[float]) -> dict[str, Any]:
    values = [float(f"{value:.6g}") for value in values]
    return {
        "least": min(values),
        "median": float(f"{median(values):.6g}"),
        "most": max(values),
        "rounds": values,
    }
