"""What the op is meant to reach, and whether it did in this run."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kernels.profile.cases import Case
from kernels.profile.results import speedup, worst
from kernels.profile.roofline import Peaks, floor_s, saved_bytes

OURS = {"save": "cublas", "recompute": "recompute", "fused": "fused"}
EAGER = "eager_grouped"  # what ratios to "eager" mean
OF_THE_GAIN = 0.9  # of what the floors let expect: GEMMs take both longer than their floor
OVER_LOOP = 2.0  # the one aim no floor knows of: a loop's cost is its launches
SAVED_SLACK = 1.01  # the layout of the tiles is saved, too
OF_COPY_RATE = 0.7


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


def judge(record: dict[str, Any]) -> Iterator[Target]:
    """Every target for a case: speed by ratios of floors, memory by count, errors by eager's."""
    case, frozen = Case.of(record["shape"]), record["frozen"]
    peaks = Peaks(**record["peaks"]).past_l2
    floors = {
        way: floor_s(case, way, "both", peaks, frozen) for way in ("eager", "compile", "cublas")
    }
    limits = {
        other: 1 + OF_THE_GAIN * (floors[way] / floors["cublas"] - 1)
        for other, way in ((EAGER, "eager"), ("compile", "compile"))
    }
    for other, limit in (
        limits.items() if case.uniform else (limits | {"eager_loop": OVER_LOOP}).items()
    ):
        what = f"speed over {other}, fwd+bwd"
        yield Target(case.name, what, True, limit, speedup(record, other, "save"))
    for mine in ("save", "recompute"):
        limit = (
            SAVED_SLACK * saved_bytes(case, OURS[mine], frozen) / saved_bytes(case, "eager", frozen)
        )
        what = f"saved memory over {EAGER}, {mine}"
        yield Target(case.name, what, False, limit, _saved_share(record, mine))
    for mine in (name for name in OURS if name in record["providers"]):
        yield Target(case.name, f"error over {EAGER}, {mine}", False, 2.0, _errors(record, mine))
    kernels = record["providers"].get("save", {}).get("kernels", {}).get("kernels", ())
    roofs = [kernel["roof"] for kernel in kernels if kernel["name"] == "pool_norm_kernel"]
    share = roofs[0] if roofs else None
    yield Target(case.name, "pool + norm kernel over copy bandwidth", True, OF_COPY_RATE, share)


def _saved_share(record: dict[str, Any], mine: str) -> float | None:
    """Bytes kept for backward over those of eager, x included."""
    if not {mine, EAGER} <= record["providers"].keys():
        return None
    own, eager = (record["providers"][name]["memory"] for name in (mine, EAGER))
    return (own["saved"] + own["saved_x"]) / (eager["saved"] + eager["saved_x"])


def _errors(record: dict[str, Any], mine: str) -> float | None:
    """The largest ratio of errors against float64, over the result and all gradients."""
    if EAGER not in record["providers"]:
        return None
    own, eager = (record["providers"][name]["errors"] for name in (mine, EAGER))
    return worst(float(own[k]) / float(eager[k]) if float(eager[k]) else math.nan for k in own)
