"""Two runs beside each other: what changed by more than it would by chance."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from kernels.profile.measured_run import SAME
from kernels.profile.results import time_ms
from kernels.profile.run_tables import LABELS, Table, number


@dataclass(frozen=True)
class Change:
    """A time of one provider, case and mode in two runs, ms; noise: what chance may change."""

    case: str
    provider: str
    mode: str
    old: float
    new: float
    noise: float

    @property
    def by(self) -> float:
        """0.05: takes 5 % longer."""
        return self.new / self.old - 1

    def slower_by_more_than(self, limit: float) -> bool:
        """Whether it is slower by more than `limit` and by more than chance."""
        return self.by > max(limit, self.noise)


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """Of every time both runs have."""
    before = {record["case"]: record for record in old["cases"]}
    return [
        Change(
            case,
            name,
            mode,
            was,
            now,
            max(_noise(before[case], name, mode), _noise(record, name, mode)),
        )
        for record in new["cases"]
        if (case := record["case"]) in before
        for name in record["providers"]
        for mode in LABELS
        if (was := time_ms(before[case], name, mode)) and (now := time_ms(record, name, mode))
    ]


def check_comparable(old: dict[str, Any], kind: str, cases: Iterable[str]) -> None:
    """ValueError where a run of this kind on these cases has nothing in common with `old`."""
    before = [record["case"] for record in old["cases"]]
    if kind != old["kind"] or not set(cases) & set(before):
        raise ValueError(
            f"--compare: the run before was {old['kind']} on {', '.join(before[:3])} (of "
            f"{len(before)}), this one is {kind} or on other cases; give its --shape"
        )


def _noise(record: dict[str, Any], name: str, mode: str) -> float:
    """How far equal measurements differ: A/A of the run, and the spread of these samples.

    Half the distance of the quartiles: the error of a median is less, but the samples of one burst
    agree more with each other than with those of another.
    """
    again = record.get("noise", {}).get(mode, 1.0)
    q1, q3 = (time_ms(record, name, mode, q) for q in ("q1_ms", "q3_ms"))
    spread = (q3 - q1) / 2 / time_ms(record, name, mode) if q1 and q3 else 0.0
    return max(abs(math.log(again)), spread)


def compare_table(old: dict[str, Any], new: dict[str, Any], limit: float | None) -> Table:
    """Every time that both have, the largest loss first; what only one has is named below."""
    rows = []
    for change in sorted(changes(old, new), key=lambda change: -change.by):
        verdict = (
            "noise" if abs(change.by) <= change.noise else "slower" if change.by > 0 else "faster"
        )
        if limit is not None and change.slower_by_more_than(limit):
            verdict = f"SLOWER by more than {limit:.0%}"
        rows.append(
            [
                *(change.case, change.provider, LABELS[change.mode]),
                *(f"{change.old:.4f}", f"{change.new:.4f}"),
                *(f"{change.by:+.1%}", f"{change.noise:.1%}", verdict),
            ]
        )
    header = ["changes", "", "", "old ms", "new ms", "by", "noise", ""]
    return Table("", header, rows, "\n".join(_remarks(old, new)))


def _remarks(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What else differs: the machines, memory that is kept, and what only one of the runs has."""
    lines = [
        f"{what}: {old['machine'].get(what)} -> {new['machine'].get(what)}"
        for what in SAME
        if old["machine"].get(what) != new["machine"].get(what)
    ]
    have = [
        {
            (record["case"], name): found
            for record in run["cases"]
            for name, found in record["providers"].items()
        }
        for run in (old, new)
    ]
    for key in sorted(have[0].keys() & have[1].keys()):
        for what in ("saved", "peak"):
            was, now = (side[key]["memory"].get(what) for side in have)
            if was and now and abs(now / was - 1) > 0.01:
                sizes = [number(size / 1e6, "{:.1f} MB") for size in (was, now)]
                lines.append(f"{' '.join(key)}: {what} memory {' -> '.join(sizes)}")
    for side, other, run in ((*have, "old"), (*reversed(have), "new")):
        lines += [f"only in the {run} run: {' '.join(key)}" for key in side if key not in other]
    return lines
