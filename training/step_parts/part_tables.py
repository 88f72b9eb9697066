"""The parts of a step as a table, from their records."""

from collections.abc import Sequence
from typing import Any

from kernels.profile.results import time_ms, worst
from kernels.profile.roofline import Peaks
from kernels.profile.run_tables import Table, number

OURS = "ours"
NOTE = """\
One pack on one device. times: how often the part runs in a forward pass. ms a pack: so often its
forward and backward, or its forward where nothing in or below it trains, and its forward once more
where activation checkpointing runs it again. share: of the sum over these parts; embeddings,
residual sums, the optimizer and the communication of ZeRO-3 are none of them. Rates: of the last
time, a FLOP that is computed again not counted. roof: the least time its FLOPs and bytes can take
at the ceilings measured in this run, over the time it took. differs by: from the trainer's own, the
worst of result and gradients (Frobenius norms)."""


def floor_ms(shape: dict[str, Any], mode: str, peaks: Peaks) -> float:
    """The least time of one call: its FLOPs, or every input and result moved once."""
    return 1e3 * max(shape["flops"][mode] / peaks.flops, shape["bytes"][mode] / peaks.bandwidth)


def rows_of_parts(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per part and provider that was timed; share is None but of the trainer's own."""
    rows = [
        _row(record, name)
        for record in records
        for name, found in record["providers"].items()
        if found["timings"]
    ]
    total = sum(row["pack_ms"] for row in rows if row["provider"] == OURS)
    for row in rows:
        row["share"] = row["pack_ms"] / total if row["provider"] == OURS else None
    return rows


def _row(record: dict[str, Any], name: str) -> dict[str, Any]:
    shape, found = record["shape"], record["providers"][name]
    mode = list(shape["flops"])[-1]
    forward, both = (time_ms(record, name, each) for each in ("forward", "both"))
    again = forward if shape["again"] and both else 0.0
    ms, flops, moved = both or forward, shape["flops"][mode], shape["bytes"][mode]
    return {
        **{"part": record["case"], "about": shape["about"], "provider": name},
        **{"times": shape["times"], "forward_ms": forward, "both_ms": both},
        "pack_ms": shape["times"] * (ms + again),
        "tflops": flops / ms / 1e9 if flops else None,
        "gb_per_s": None if flops else moved / ms / 1e6,
        "roof": floor_ms(shape, mode, Peaks(**record["peaks"])) / ms,
        "error": worst(map(float, found["errors"].values())) if "errors" in found else None,
    }


def parts_table(records: Sequence[dict[str, Any]], measured: bool) -> Table:
    """All parts; floors alone where nothing was measured."""
    rows = [
        [
            *(row["part"] if row["provider"] == OURS else f"  {row['provider']}", row["about"]),
            *(str(row["times"]), *(number(row[f"{m}_ms"], "{:.4g}") for m in ("forward", "both"))),
            *(f"{row['pack_ms']:.4g}", number(row["share"], "{:.1%}")),
            *_rates(row, measured),
        ]
        for row in rows_of_parts(records)
    ]
    header = [
        *("part", "", "times", "forward ms", "fwd+bwd ms", "ms a pack", "share"),
        *(("TFLOP/s", "GB/s", "roof", "differs by") if measured else ()),
    ]
    said = [
        f"{record['case']}: {name} left out: {why}"
        for record in records
        for name, why in record["skipped"].items()
    ]
    calculated = "Calculated, not measured: each time is the least that the ceilings allow.\n"
    note = ("" if measured else calculated) + "\n".join([NOTE, *said])
    return Table("the parts of a step", header, rows, note)


def _rates(row: dict[str, Any], measured: bool) -> list[str]:
    if not measured:
        return []
    return [
        *(number(row["tflops"], "{:.3g}"), number(row["gb_per_s"], "{:.3g}")),
        f"{row['roof']:.0%}",
        "-" if row["provider"] == OURS else number(row["error"], "{:.1e}"),
    ]
