"""A mean token budget: which sample gets which count, and what that is worth.

A budget of B allows B tokens per tile in the mean over all tiles of an evaluation: as many as a
fixed count of B would take. S samples, K counts.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations_with_replacement
from typing import Any

import numpy as np

from data_pipeline.errors import InputError
from data_pipeline.text_table import text_table
from training.evaluate.router import Floats, Ints
from training.evaluate.summary import CONFIDENCE, resample_means

_FORM = re.compile(r"(?:tokens=)?(\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class Policy:
    """What a way to choose counts comes to.

    mean_tokens: per tile. shares: count -> part of the samples that get it. low, high: the
    bootstrap's 95 % interval of the accuracy.
    """

    name: str
    mean_tokens: float
    accuracy: float
    low: float
    high: float
    shares: dict[int, float]


def parse_token_budget(text: str) -> float | None:
    """Read `tokens=64` or `64`; None for another form."""
    match = _FORM.fullmatch(text.replace(" ", ""))
    return float(match[1]) if match else None


def check_token_budget(budget: float, counts: Sequence[int]) -> None:
    """InputError where no choice among the counts can keep to the budget."""
    if len(counts) < 2:
        raise InputError(
            f"a token budget chooses among counts, but only {counts[0]} is evaluated; give more "
            "with --num-image-tokens"
        )
    if budget < counts[0]:
        raise InputError(
            f"the budget of {budget:g} tokens is below the smallest count, {counts[0]}: give "
            f"--budget {counts[0]} or more, or a smaller count with --num-image-tokens"
        )


def allocate(values: Floats, counts: Ints, tiles: Ints, budget: float) -> Ints:
    """The count of each sample, as its number, [S], that makes the sum of values large.

    From the smallest count on, always the step that adds most value per token, until the next
    one would break the budget: among all choices of that many tokens none has a larger sum.

    Args:
        values: [S, K], of each count for each sample. counts: [K], ascending. tiles: [S].
        budget: tokens per tile, at least the smallest count.
    """
    size, rows = len(values), np.arange(len(values))
    tokens = np.maximum(tiles, 1e-9)[:, None] * counts  # text is free
    at = np.zeros(size, dtype=np.int64)
    before = np.full(size, np.inf)
    steps: list[tuple[Floats, Ints, Ints, Ints]] = []  # gain per token, sample, count, tokens
    for _ in range(len(counts) - 1):
        more = tokens - tokens[rows, at][:, None]
        gain = values - values[rows, at][:, None]
        rate = np.where(more > 0, gain / np.where(more > 0, more, 1), -np.inf)
        best = rate.argmax(axis=1)
        # A sample's steps add less and less; rounding must not turn their order.
        before = np.minimum(before, rate[rows, best])
        worth = np.flatnonzero(before > 0)
        spent = tiles[worth] * (counts[best] - counts[at])[worth]
        steps.append((before[worth], worth, best[worth], spent))
        at[worth] = best[worth]
    rates, sample, count, spent = (np.concatenate(column) for column in zip(*steps, strict=True))
    order = np.argsort(-rates, kind="stable")
    room = (budget - counts[0]) * tiles.sum() * (1 + 1e-12)
    order = order[np.cumsum(spent[order]) <= room]
    chosen = np.zeros(size, dtype=np.int64)
    chosen[sample[order]] = count[order]  # of a sample's steps the last one counts
    return chosen


def compare(
    scores: Floats,
    predicted: Floats,
    counts: Sequence[int],
    tiles: Ints,
    budget: float,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """The router beside a fixed count, the best mix of two counts, and the oracle.

    Args:
        scores: [S, K], of the answers at each count. predicted: [S, K], by the router.
    """
    array, rows = np.array(counts, dtype=np.int64), np.arange(len(scores))
    if not tiles.any():
        raise InputError("the samples have no images, on which a token budget could be spent")

    def chosen(name: str, choice: Ints) -> tuple[str, float, Floats, dict[int, float]]:
        mean = float((tiles * array[choice]).sum() / tiles.sum())
        shares = {count: float((choice == k).mean()) for k, count in enumerate(counts)}
        return name, mean, scores[rows, choice], shares

    fixed = int(np.flatnonzero(array <= budget).max())
    routed = chosen("router", allocate(predicted, array, tiles, budget))
    found = [
        chosen(f"fixed {counts[fixed]}", np.full(len(scores), fixed)),
        best_mix(scores, counts, routed[1]),
        routed,
        chosen("oracle", allocate(scores, array, tiles, budget)),
    ]
    means = resample_means(np.stack([score for _, _, score, _ in found]), resamples, seed)
    policies = [
        Policy(name, mean, float(score.mean()), *_interval(own), shares)
        for (name, mean, score, shares), own in zip(found, means, strict=True)
    ]
    low, high = _interval(means[2] - means[1])
    gain = policies[2].accuracy - policies[1].accuracy
    return {
        "budget": budget,
        "samples": len(scores),
        "policies": [asdict(policy) for policy in policies],
        "router_over_fixed": {"difference": gain, "low": low, "high": high},
    }


def best_mix(
    scores: Floats, counts: Sequence[int], mean: float
) -> tuple[str, float, Floats, dict[int, float]]:
    """Two counts given to samples by chance, in the parts that come to `mean` tokens.

    Of all pairs the one that is most often right, as these samples show; their expected scores.
    """
    best: tuple[str, float, Floats, dict[int, float]] | None = None
    for low, high in combinations_with_replacement(range(len(counts)), 2):
        if not counts[low] - 1e-9 <= mean <= counts[high] + 1e-9:
            continue
        width = counts[high] - counts[low]
        part = min(1.0, max(0.0, (mean - counts[low]) / width)) if width else 0.0
        expected = (1 - part) * scores[:, low] + part * scores[:, high]
        if best is None or expected.mean() > best[2].mean():
            name = f"fixed, {counts[low]} and {counts[high]} mixed" if width else "fixed, same mean"
            shares = dict.fromkeys(counts, 0.0)
            shares[counts[low]] += 1 - part
            shares[counts[high]] += part
            best = name, mean, expected, shares
    assert best is not None, "a mean of counts lies between them"
    return best


def budget_table(found: Mapping[str, Any]) -> str:
    """What `compare` found, for people."""
    counts = list(found["policies"][0]["shares"])
    lines = [["", "tokens a tile", "accuracy %", "95 % interval", *(f"% at {c}" for c in counts)]]
    for policy in found["policies"]:
        lines.append(
            [
                policy["name"],
                f"{policy['mean_tokens']:.1f}",
                f"{100 * policy['accuracy']:.1f}",
                f"{100 * policy['low']:.1f} to {100 * policy['high']:.1f}",
                *(f"{100 * policy['shares'][count]:.0f}" for count in counts),
            ]
        )
    gain = found["router_over_fixed"]
    return (
        f"at most {found['budget']:g} tokens per tile in the mean, {found['samples']} samples:\n"
        f"{text_table(lines, left=(0,))}\n"
        "router over the mix of fixed counts at equal mean tokens: "
        f"{100 * gain['difference']:+.1f} points "
        f"({100 * gain['low']:+.1f} to {100 * gain['high']:+.1f})"
    )


def _interval(means: Floats) -> tuple[float, float]:
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)
