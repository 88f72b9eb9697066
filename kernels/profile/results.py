"""The file of a run, what is derived from it, and how it is read back."""

import csv
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kernels.profile.cases import Case
from kernels.profile.providers import PROVIDERS
from kernels.profile.roofline import Peaks, floor_s, model_flops, saved_bytes

SCHEMA = 1  # raised where a reader of older files would go wrong
RESULTS = "results.json"
BASELINES = ("eager_loop", "eager_grouped", "eager_batched", "compile")
CALCULATED_AS = {"eager_grouped": "eager", "compile": "compile", "save": "cublas"}
CALCULATED_AS |= {"fused": "fused", "recompute": "recompute"}


def read_results(path: Path) -> dict[str, Any]:
    """A run's file, or that in its folder; ValueError says what is wrong with it and what to do."""
    path = path / RESULTS if path.is_dir() else path
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}; name a results.json") from error
    found = content.get("schema") if isinstance(content, dict) else None
    if found != SCHEMA:
        raise ValueError(
            f"{path} has schema {found}, this version reads {SCHEMA}; measure it again, or read it "
            "with the version that wrote it"
        )
    return content


def calculated_case(case: Case, peaks: Peaks, frozen: bool, modes: Sequence[str]) -> dict[str, Any]:
    """The record of a case of which nothing was measured: what it takes if all goes to memory."""
    providers = {}
    for name, way in CALCULATED_AS.items():
        seconds = {mode: floor_s(case, way, mode, peaks.past_l2, frozen) for mode in modes}
        providers[name] = {
            "memory": {"saved": saved_bytes(case, way, frozen), "saved_x": 0},
            "timings": {mode: {"median_ms": 1e3 * value} for mode, value in seconds.items()},
        }
    return {
        **{"case": case.name, "shape": asdict(case), "peaks": asdict(peaks), "frozen": frozen},
        "providers": providers,
    }


def rows_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per provider and mode of a case."""
    return [
        _row(record, name, mode)
        for name, found in record["providers"].items()
        for mode in found["timings"]
    ]


def _row(record: dict[str, Any], name: str, mode: str) -> dict[str, Any]:
    case, peaks, found = (
        Case.of(record["shape"]),
        Peaks(**record["peaks"]),
        record["providers"][name],
    )
    seconds, flops = found["timings"][mode]["median_ms"] / 1e3, model_flops(case, mode)
    errors = {of: float(error) for of, error in found.get("errors", {}).items()}
    return {
        "case": record["case"],
        "tokens": case.rows,
        "frozen_vit": record["frozen"],
        "provider": name,
        "mode": mode,
        **found["timings"][mode],
        **{f"speedup_over_{other}": speedup(record, other, name, mode) for other in BASELINES},
        "noise": record.get("noise", {}).get(mode),
        "tflops": flops / seconds / 1e12,
        "floor_ms": 1e3 * floor_s(case, PROVIDERS[name].way, mode, peaks, record["frozen"]),
        # Of perfect fusion at the ceilings measured in this run: the same floor for everyone.
        "roofline": floor_s(case, "fused", mode, peaks, record["frozen"]) / seconds,
        **{f"{what}_bytes": value for what, value in found["memory"].items()},
        "error": errors.get("out"),
        "error_worst_gradient": worst(v for k, v in errors.items() if k != "out"),
    }


def speedup(record: dict[str, Any], other: str, name: str, mode: str = "both") -> float | None:
    """How many times faster than `other` a provider is, in the same run; None if not measured."""
    times = [time_ms(record, key, mode) for key in (other, name)]
    return times[0] / times[1] if times[0] and times[1] else None


def time_ms(record: dict[str, Any], name: str, mode: str = "both", what: str = "median_ms") -> Any:
    """A figure of a timing, or None where it was not measured."""
    return record["providers"].get(name, {}).get("timings", {}).get(mode, {}).get(what)


def worst(values: Iterable[float]) -> float:
    """The largest, nan if there is one."""
    values = list(values)
    return math.nan if any(map(math.isnan, values)) else max(values, default=0.0)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Strict JSON, in place of the file at once; numbers that are not finite become strings."""
    written = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        written.write_text(json.dumps(_finite(content), indent=1, allow_nan=False) + "\n")
        written.replace(path)
    finally:
        written.unlink(missing_ok=True)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """The rows with the columns of all of them, in order of first appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
