"""A run as tables, for the terminal and for the page."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kernels.aligned_text import aligned
from kernels.profile.cases import Case
from kernels.profile.results import rows_of, time_ms
from kernels.profile.roofline import MODES, WAYS, Peaks, floor_s, in_l2, model_flops, saved_bytes
from kernels.profile.targets import Target

LABELS = {"forward": "forward", "backward": "backward", "both": "fwd+bwd"}
SHORT, SMALL = 60, 0.002  # of a kernel's name, and share of the time


@dataclass(frozen=True)
class Table:
    """header and rows of cells, what stands above and below."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def __str__(self) -> str:
        parts = (self.title, aligned([self.header, *self.rows]) if self.rows else "", self.note)
        return "\n".join(part for part in parts if part)


def case_table(record: dict[str, Any]) -> Table:
    """Times with their quartiles, ratios of one mode, memory, error."""
    rows, case = rows_of(record), Case.of(record["shape"])
    modes = [mode for mode in MODES if any(row["mode"] == mode for row in rows)]
    main = [row for row in rows if row["mode"] == modes[-1]] if modes else []
    note = [f"{name} FAILED: {why}" for name, why in record["failed"].items()]
    if record["noise"]:
        ratios = ", ".join(f"{LABELS[mode]} {ratio:.3f}" for mode, ratio in record["noise"].items())
        note.insert(0, f"A/A, {record['repeated']} timed again after all others: {ratios}")
    if gpu := record.get("gpu"):
        spans = [f"{f} {' / '.join(f'{v:g}' for v in gpu[f])}" for f in gpu if f != "throttled"]
        throttled = ", ".join(gpu["throttled"]) or "never"
        note.append(
            f"while timing (least / median / most): {', '.join(spans)}; throttled: {throttled}"
        )
    return Table(
        f"{case.name}: {case.rows} tokens, {model_flops(case, 'forward') / 1e9:.3g} GFLOP forward"
        + (", x without gradient" if record["frozen"] else ""),
        [
            *("", *(f"{LABELS[mode]} ms (quartiles)" for mode in modes)),
            *(f"{LABELS[modes[-1]] if modes else ''}: vs loop", "vs eager", "vs compile"),
            *("TFLOP/s", "roofline", "host ms", "saved MB", "peak MB", "error", "gradients'"),
        ],
        [[row["provider"], *_times(record, row, modes), *_figures(row)] for row in main],
        "\n".join(note),
    )


def _times(record: dict[str, Any], row: dict[str, Any], modes: Sequence[str]) -> list[str]:
    return [
        "{:.3f} ({:.3f} .. {:.3f})".format(
            *(time_ms(record, row["provider"], mode, q) for q in ("median_ms", "q1_ms", "q3_ms"))
        )
        for mode in modes
    ]


def _figures(row: dict[str, Any]) -> list[str]:
    peak = row["peak_bytes"]
    return [
        *(
            number(row[f"speedup_over_{other}"], "{:.2f}x")
            for other in ("eager_loop", "eager_grouped", "compile")
        ),
        f"{row['tflops']:.3g}",
        f"{row['roofline']:.0%}",
        f"{row['host_ms']:.3f}",
        f"{(row['saved_bytes'] + row['saved_x_bytes']) / 1e6:.3g}",
        number(peak and peak / 1e6, "{:.3g}"),
        f"{row['error']:.1e}",
        f"{row['error_worst_gradient']:.1e}",
    ]


def number(value: float | None, how: str) -> str:
    """Written so, or a dash where there is none."""
    return "-" if value is None else how.format(value)


EXPLANATION = """\
vs: how many times faster, side by side in this run; eager is eager_grouped. roofline: time of
perfect fusion at the measured ceilings over time taken. host ms: what issuing one call costs the
host; where it is above the time, the host is the limit. saved: what autograd keeps for backward, x
included where it is kept. error: of the result against float64, gradients': of the worst gradient.
A ratio closer to 1 than A/A is noise. Kernels: per call, from a trace of its own, in which gaps are
longer than without; roof: the least time a kernel's work can take over the time it took."""


def kernel_table(record: dict[str, Any], name: str) -> Table:
    """The kernels of one provider on one case."""
    found = record["providers"][name]["kernels"]
    rows = [
        [
            kernel["name"][:SHORT],
            f"{kernel['launches']:g}",
            f"{kernel['us']:.1f}",
            f"{kernel['share']:.1%}",
            number(kernel["gb_per_s"], "{:.0f}"),
            number(kernel["tflops"], "{:.3g}"),
            number(kernel["roof"], "{:.0%}"),
        ]
        for kernel in found["kernels"]
        if kernel["share"] >= SMALL
    ]
    rest = [kernel for kernel in found["kernels"] if kernel["share"] < SMALL]
    sums = [sum(kernel[what] for kernel in rest) for what in ("launches", "us", "share")]
    if rest:
        rows.append(
            [f"{len(rest)} others", f"{sums[0]:g}", f"{sums[1]:.1f}", f"{sums[2]:.1%}", *"---"]
        )
    gaps = f", {found['gaps']:g} gaps" if found["gaps"] else ""
    return Table(
        f"kernels of {name}, forward and backward, {record['case']}",
        ["kernel", "launches", "us", "share", "GB/s", "TFLOP/s", "roof"],
        rows,
        f"kernels {found['busy_us']:.1f} us, between them {found['gap_us']:.1f} us{gaps}",
    )


def floors_table(records: Sequence[dict[str, Any]]) -> Table:
    """The least time of each way of running each case, and what is kept for backward."""
    rows = []
    for record in records:
        case, frozen = Case.of(record["shape"]), record["frozen"]
        given = (peaks := Peaks(**record["peaks"])).past_l2, frozen
        floors = {m: [1e6 * floor_s(case, way, m, *given) for way in WAYS] for m in MODES}
        eager, compiled, cublas, fused, _ = floors["both"]
        kept = [
            saved_bytes(case, way, frozen) for way in ("eager", "compile", "cublas", "recompute")
        ]
        rows.append(
            [
                case.name,
                f"{model_flops(case, 'forward') / 1e9:.3g}",
                _slashed(floors["forward"][:4]),
                _slashed(floors["backward"]),
                *(f"{b / a:.2f}x" for a in (cublas, fused) for b in (eager, compiled)),
                _slashed(value / 1e6 for value in kept),
                "{} of {}".format(*in_l2(case, "cublas", "both", peaks, frozen)),
            ]
        )
    header = [
        *("calculated", "GFLOP fwd", "forward us", "backward us", "cublas over eager"),
        *("over compile", "fused over eager", "over compile", "kept MB", "in L2"),
    ]
    return Table("", header, rows, FLOORS)


FLOORS = """\
Times: each pass over memory at the copy rate, each matrix product at its own. Columns with slashes:
eager / compile / cublas, this op as it ships / fused, its fused matrix products if they were as
fast as cuBLAS / recompute (backward only). Ratios: forward and backward together. Kept:
eager / compile / save / recompute. In L2: passes of this op over tensors that fit in the L2 cache,
which may be faster than that; where there are any, the times are estimates and no bounds."""


def _slashed(values: Any) -> str:
    return " / ".join(f"{value:.0f}" for value in values)


def targets_table(targets: Sequence[Target]) -> Table:
    """Every target with what was measured."""
    verdicts = {True: "met", False: "NOT MET", None: "not measured"}
    rows = [
        [
            target.case,
            target.what,
            f"{'>=' if target.at_least else '<='} {target.limit:.3g}",
            number(target.measured, "{:.3g}"),
            verdicts[target.met],
        ]
        for target in targets
    ]
    count = Counter(target.met for target in targets)
    note = f"{count[True]} met, {count[False]} not met, {count[None]} not measured"
    return Table("", ["targets", "", "limit", "measured", ""], rows, note)
