"""What the op is meant to reach, and whether it did in this run."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from kernels.profile.bench import CaseResult
from kernels.profile.results import speedup, worst
from kernels.profile.roofline import pool_norm_bytes

OURS = ("save", "recompute", "fused")
EAGER = "eager_grouped"  # what ratios to "eager" mean


@dataclass(frozen=True)
class Target:
    """One aim for one case; measured is None where what it compares was not measured."""

    case: str
    what: str
    at_least: bool
    limit: float
    measured: float | None

    @property
    def met(self) -> bool | None:
        """None where nothing was measured; a nan is not met."""
        if self.measured is None:
            return None
        met = self.measured >= self.limit if self.at_least else self.measured <= self.limit
        return met and not math.isnan(self.measured)


def judge(results: Iterable[CaseResult]) -> list[Target]:
    """Every target for every case it is about."""
    return [target for result in results for target in _of_case(result)]


def _of_case(result: CaseResult) -> Iterator[Target]:
    case = result.case
    if case.pool == "resize":
        speeds = {EAGER: 1.3}
    elif case.uniform:
        speeds = {"compile": 1.05, EAGER: 1.15}
    else:
        speeds = {"eager_loop": 2.0, EAGER: 1.3}
    for other, limit in speeds.items():
        ratio = speedup(result, other, "save", "both")
        yield Target(case.name, f"speed over {other}, fwd+bwd", True, limit, ratio)
    for mine, limit in (("save", 0.4), ("recompute", 0.08)):
        share = _saved_share(result, mine)
        yield Target(case.name, f"saved memory over {EAGER}, {mine}", False, limit, share)
    for mine in OURS:
        if mine in result.measured:
            yield Target(
                case.name, f"error over {EAGER}, {mine}", False, 2.0, _errors(result, mine)
            )
    share = None
    if result.pool_norm:
        rate = pool_norm_bytes(case) / (result.pool_norm.median_ms / 1e3)
        share = rate / result.peaks.bandwidth
    yield Target(case.name, "pool + norm kernel over copy bandwidth", True, 0.7, share)


def _saved_share(result: CaseResult, mine: str) -> float | None:
    """Bytes kept for backward over those of eager, x included; a frozen tower is another case."""
    if result.frozen or not {mine, EAGER} <= result.measured.keys():
        return None
    own, eager = (result.measured[name].memory for name in (mine, EAGER))
    return (own.saved + own.saved_x) / (eager.saved + eager.saved_x)


def _errors(result: CaseResult, mine: str) -> float | None:
    """The largest ratio of errors against float64, over the result and all gradients."""
    if EAGER not in result.measured:
        return None
    own, eager = result.measured[mine].errors, result.measured[EAGER].errors
    return worst(own[name] / eager[name] if eager[name] else math.nan for name in own)
