"""What the paper claims, and whether it held here, by the intervals over seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from training.experiments.flexibility.seed_statistics import Scores, SeedInterval

HELD, FAILED, OPEN, UNTESTED = "held", "did not hold", "undecided", "not tested"
LOSS = 0.02
"""An accuracy that is lower by less than this counts as kept."""
_SAVINGS = {
    "image_tokens": "fewer vision tokens in training",
    "flops": "fewer FLOPs in training",
    "time": "less time a step",
}


@dataclass(frozen=True)
class Claim:
    """A claim of one arm: what it says, the numbers found, and what follows."""

    says: str
    arm: str
    found: str
    verdict: str

    def __str__(self) -> str:
        return f"{self.verdict}: {self.arm}: {self.says}: {self.found}"

    def to_json(self) -> dict[str, str]:
        return vars(self)


def above(difference: SeedInterval, by: float = 0.0) -> str:
    """Whether a mean difference is above -`by`: decided only where the whole interval is."""
    if difference.low is None or difference.high is None:
        return UNTESTED
    if difference.low > -by:
        return HELD
    return FAILED if difference.high < -by else OPEN


def accuracy_claims(scores: Scores) -> list[Claim]:
    """Every claim on accuracy that these arms can speak to."""
    found: list[Claim] = []
    fixed = scores.fixed()
    for arm in scores.flexible():
        found += [
            _beats_fixed(scores, arm, count, other)
            for count, other in fixed.items()
            if count in scores.drawn[arm] and scores.seeds(arm, other)
        ]
        found += _keeps_unseen(scores, arm)
    found += [claim for count in fixed for claim in _collapses(scores, fixed, count)]
    return found


def _beats_fixed(scores: Scores, arm: str, count: int, other: str) -> Claim:
    difference = scores.difference(arm, other, count)
    return Claim(
        f"above {other} at its own {count} tokens",
        arm,
        f"{difference.points(sign=True)} points",
        above(difference),
    )


def _keeps_unseen(scores: Scores, arm: str) -> list[Claim]:
    """Counts between drawn ones, against the next drawn count below: more tokens, no loss."""
    drawn = scores.drawn[arm]
    unseen = [n for n in scores.counts if n not in drawn and n > drawn[0]]
    if not unseen:
        return []
    seeds = scores.seeds(arm)
    per_count = [
        scores.at(arm, n, seeds) - scores.at(arm, max(d for d in drawn if d < n), seeds)
        for n in unseen
    ]
    worst = min(range(len(unseen)), key=lambda i: float(per_count[i].mean()))
    over = SeedInterval.of((sum(per_count) / len(per_count)).tolist())
    return [
        Claim(
            f"keeps at {_listed(unseen)} tokens, never drawn, what the drawn count below has",
            arm,
            f"{over.points(sign=True)} points in the mean, "
            f"{100 * per_count[worst].mean():+.1f} at {unseen[worst]}",
            above(over, LOSS),
        )
    ]


def _collapses(scores: Scores, fixed: Mapping[int, str], count: int) -> list[Claim]:
    """A fixed arm at the counts of the other fixed arms, against these."""
    arm = fixed[count]
    others = {n: other for n, other in fixed.items() if n != count}
    seeds = scores.seeds(arm, *others.values())
    if not others or not seeds:  # an experiment that is not complete
        return []
    behind = [scores.at(other, n, seeds) - scores.at(arm, n, seeds) for n, other in others.items()]
    mean = sum(behind) / len(behind)
    return [
        Claim(
            f"collapses at {_listed([*others])} tokens, against the arms trained there",
            arm,
            f"{SeedInterval.of((-mean).tolist()).points(sign=True)} points",
            above(SeedInterval.of(mean.tolist()), -LOSS),
        )
    ]


def saving_claims(spent: Mapping[str, Mapping[str, float]], reference: str) -> list[Claim]:
    """What each flexible arm spends less than the one fixed at the largest count.

    spent: arm -> "image_tokens" and "flops" of the same samples, "time" of the same steps where
    it was measured.
    """
    found = []
    for arm, own in spent.items():
        if arm == reference:
            continue
        for key, says in _SAVINGS.items():
            if key in own and key in spent[reference]:
                ratio = own[key] / spent[reference][key]
                verdict = HELD if ratio < 1 else FAILED
                text = f"{100 * (ratio - 1):+.0f} %"
                found.append(Claim(f"{says} than {reference}", arm, text, verdict))
    return found


def in_words(claims: Sequence[Claim]) -> str:
    """All claims, those that held first."""
    order = (HELD, FAILED, OPEN, UNTESTED)
    return "\n".join(str(c) for c in sorted(claims, key=lambda c: order.index(c.verdict)))


def _listed(counts: Sequence[int]) -> str:
    return ", ".join(map(str, counts))


def to_json(claims: Sequence[Claim]) -> list[dict[str, Any]]:
    """For the record."""
    return [claim.to_json() for claim in claims]
