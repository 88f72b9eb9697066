"""The record of an experiment as tables and words, for people and for docs."""

from collections.abc import Mapping
from typing import Any

from training.evaluate.in_training import ALL
from training.experiments.flexibility.paper_claims import Claim, in_words
from training.experiments.flexibility.seed_statistics import SeedInterval


def markdown(record: Mapping[str, Any]) -> str:
    """Tables and claims; a count is bold where the arm drew it in training."""
    parts = []
    for basis, by_detail in record["accuracy"].items():
        for detail in shown_details(by_detail):
            what = "all questions" if detail == ALL else detail
            head = f"At equal {basis}, {what}, exact match in %:"
            parts += [head, accuracy_table(record, basis, detail)]
    parts += ["Spent by a run at equal samples:", spent_table(record)]
    for key, claims in record["claims"].items():
        head = "Savings:" if key == "savings" else f"At equal {key}:"
        parts += [head, in_words([Claim(**claim) for claim in claims])]
    return "\n\n".join(parts) + "\n"


def shown_details(by_detail: Mapping[str, Any]) -> list[str]:
    """The level with the most detail, where there are several, and all questions."""
    details = [detail for detail in by_detail if detail != ALL]
    return [*(details[-1:] if len(details) > 1 else []), ALL]


def accuracy_table(record: Mapping[str, Any], basis: str, detail: str) -> str:
    """A row per arm, a column per count: the mean, and half of its interval."""
    arms = record["accuracy"][basis][detail]
    counts = [*next(iter(arms.values()))]
    lines = ["| trained at | " + " | ".join(counts) + " |", "|---" * (len(counts) + 1) + "|"]
    for arm, by_count in arms.items():
        drawn = {str(count) for count in record["experiment"]["arms"][arm]["draw"]}
        cells = [_cell(by_count[n], n in drawn) for n in counts]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(found: Mapping[str, Any], drawn: bool) -> str:
    text = f"{100 * found['mean']:.1f}"
    text = f"**{text}**" if drawn else text
    return text if found["low"] is None else f"{text} ± {100 * (found['high'] - found['mean']):.1f}"


def spent_table(record: Mapping[str, Any]) -> str:
    """What a run of each arm took; times over that of the arm fixed at the largest count."""
    lines = [
        "| trained at | steps | samples | million vision tokens | TFLOP | time of a step, % |",
        "|---" * 6 + "|",
    ]
    for arm, spent in record["spent"].items():
        cells = [
            arm,
            f"{spent['steps']:.0f}",
            f"{spent['samples']:.0f}",
            f"{spent['image_tokens'] / 1e6:.2f}",
            f"{spent['flops'] / 1e12:.2f}",
            _percent(record["time_over_largest_fixed"].get(arm)),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _percent(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    return SeedInterval(found["mean"], found["low"], found["high"], found["seeds"]).points()
