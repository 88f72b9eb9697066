"""What was measured as rows of numbers, and the files they are written to."""

import csv
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kernels.profile.bench import CaseResult, Measured
from kernels.profile.providers import PROVIDERS
from kernels.profile.roofline import (
    bytes_moved,
    floor_s,
    model_flops,
    pool_norm_bytes,
    pool_norm_flops,
)


def rows_of(result: CaseResult) -> list[dict[str, Any]]:
    """One row per provider and mode, then one for the kernel of pooling and LayerNorm."""
    rows = [
        _row(result, name, found, mode)
        for name, found in result.measured.items()
        for mode in found.timings
    ]
    return rows + ([_pool_norm_row(result)] if result.pool_norm else [])


def _row(result: CaseResult, name: str, found: Measured, mode: str) -> dict[str, Any]:
    case, timing, way = result.case, found.timings[mode], PROVIDERS[name].way
    seconds, flops = timing.median_ms / 1e3, model_flops(case, mode)
    moved = bytes_moved(case, way, mode, result.frozen)
    row = _head(result, name, mode) | asdict(timing)
    row |= {f"speedup_over_{other}": speedup(result, other, name, mode) for other in BASELINES}
    return row | {
        "noise": result.noise.get(mode),
        "tflops": flops / seconds / 1e12,
        "gb_per_s": moved / seconds / 1e9,
        "flops_per_byte": flops / moved,
        "floor_ms": 1e3 * floor_s(case, way, mode, result.peaks, result.frozen),
        # Of perfect fusion at the ceilings measured in this run: the same floor for everyone.
        "roofline": floor_s(case, "fused", mode, result.peaks, result.frozen) / seconds,
        "peak_bytes": found.memory.peak,
        "saved_bytes": found.memory.saved,
        "saved_x_bytes": found.memory.saved_x,
        "held_bytes": found.memory.held,
        "error": found.errors["out"],
        "error_worst_gradient": worst(v for k, v in found.errors.items() if k != "out"),
    }


def _pool_norm_row(result: CaseResult) -> dict[str, Any]:
    assert result.pool_norm is not None
    case, seconds = result.case, result.pool_norm.median_ms / 1e3
    moved, flops = pool_norm_bytes(case), pool_norm_flops(case)
    return (
        _head(result, "pool_norm", "kernel")
        | asdict(result.pool_norm)
        | {
            "tflops": flops / seconds / 1e12,
            "gb_per_s": moved / seconds / 1e9,
            "flops_per_byte": flops / moved,
            "floor_ms": 1e3 * moved / result.peaks.bandwidth,
            "roofline": moved / result.peaks.bandwidth / seconds,
        }
    )


def _head(result: CaseResult, name: str, mode: str) -> dict[str, Any]:
    case = result.case
    return {
        "case": case.name,
        "tiles": case.tiles,
        "tokens": case.rows,
        "pool": case.pool,
        "dtype": case.dtype,
        "frozen_vit": result.frozen,
        "provider": name,
        "mode": mode,
    }


BASELINES = ("eager_loop", "eager_grouped", "eager_batched", "compile")


def speedup(result: CaseResult, other: str, name: str, mode: str) -> float | None:
    """How many times faster than `other` a provider is, in the same run; None if not measured."""
    times = [
        result.measured[key].timings[mode].median_ms
        for key in (other, name)
        if key in result.measured and mode in result.measured[key].timings
    ]
    return times[0] / times[1] if len(times) == 2 else None


def worst(values: Any) -> float:
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
