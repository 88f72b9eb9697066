"""Launch configurations: a static table per architecture and number of rows.

Nothing is tuned at run time: the order of a sum follows the block sizes, so ranks that chose their
own blocks would no longer run the same bits. `python -m kernels.tune` measures this GPU and writes
a table; naming that file in TOKENFLEX_TILES, on every rank, replaces entries of this one.
"""

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

TILES_VARIABLE = "TOKENFLEX_TILES"


@dataclass(frozen=True)
class LaunchConfig:
    """How one kernel is launched: its constexpr block sizes, warps per program, pipeline stages."""

    constants: Mapping[str, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 1

    @property
    def options(self) -> dict[str, int]:
        """What the launch is called with, beside the kernel's own arguments."""
        return {**self.constants, "num_warps": self.num_warps, "num_stages": self.num_stages}


Buckets = Mapping[int, LaunchConfig]  # log2 of the fewest rows an entry is for -> entry


def _row_kernels(window: int = 4) -> dict[str, Buckets]:
    """The kernels bound by memory: alike on every architecture until one is measured to differ.

    window: patches of a line that the pooling loads at once.
    """
    return {
        "pool_norm": {0: LaunchConfig({"WINDOW": window}, num_warps=4)},
        "norm": {0: LaunchConfig({}, num_warps=4)},
        "norm_backward": {0: LaunchConfig({}, num_warps=4)},
        "pool_backward": {0: LaunchConfig({"WINDOW": 2}, num_warps=4)},
        "swiglu": {0: LaunchConfig({"BLOCK": 2048}, num_warps=4)},
        "swiglu_backward": {0: LaunchConfig({"BLOCK_M": 16, "BLOCK_N": 128}, num_warps=4)},
        "column_sum": {0: LaunchConfig({"BLOCK_M": 32, "BLOCK_N": 32}, num_warps=4)},
    }


def _gemm(m: int, n: int, k: int, warps: int, stages: int) -> LaunchConfig:
    blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": 8}
    return LaunchConfig(blocks, num_warps=warps, num_stages=stages)


# The blocks of the fused GEMMs are the largest that compile without spills; see NOTES.md.
_WIDE_GEMMS: dict[str, Buckets] = {
    "dual_gemm": {0: _gemm(64, 64, 64, 4, 3), 12: _gemm(128, 128, 64, 8, 3)},
    "gate_gemm": {
        0: _gemm(64, 64, 64, 4, 3),
        12: _gemm(128, 128, 64, 8, 3),
        13: _gemm(128, 256, 64, 8, 3),
    },
}
TABLE: dict[str, dict[str, Buckets]] = {
    "sm_80": _row_kernels(window=2)  # 4 spills there in float32
    | {
        "dual_gemm": {0: _gemm(64, 64, 32, 4, 4), 12: _gemm(128, 64, 32, 8, 4)},
        "gate_gemm": {0: _gemm(64, 64, 32, 4, 4), 12: _gemm(128, 128, 32, 8, 4)},
    },
    "sm_90": _row_kernels() | _WIDE_GEMMS,
    "sm_100": _row_kernels() | _WIDE_GEMMS,
}
# The fused GEMMs that gemm="auto" takes. None has been measured to beat cuBLAS and an elementwise
# kernel yet, so none is on.
FUSED: dict[str, tuple[str, ...]] = {"sm_80": (), "sm_90": (), "sm_100": ()}
SAFE_DEFAULT = "sm_80"  # fits the shared memory of everything newer
INTERPRETED = "sm_90"  # whose entries the interpreter runs


def device_architecture(device: torch.device) -> str:
    """Name of the device's own architecture, whether the table knows it or not."""
    if device.type != "cuda":
        return INTERPRETED
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def architecture(device: torch.device) -> str:
    """Name of the device's architecture as in the table, "sm_90" for one; the interpreter's on CPU.

    Warns once about an architecture the table does not know, and returns the safe default.
    """
    if device.type != "cuda":
        return INTERPRETED
    index = device.index if device.index is not None else torch.cuda.current_device()
    return _cuda_architecture(index)


@cache
def _cuda_architecture(index: int) -> str:
    name = device_architecture(torch.device("cuda", index))
    return known_architecture(name, torch.cuda.get_device_name(index))


def known_architecture(name: str, device_name: str) -> str:
    """`name` where the table has it, else the safe default with a warning."""
    if name in _table():
        return name
    warnings.warn(
        f"no launch configurations for {name} ({device_name}): taking those of {SAFE_DEFAULT}, "
        f"which run but may be slow; python -m kernels.tune writes a table for {TILES_VARIABLE}",
        stacklevel=2,
    )
    return SAFE_DEFAULT


def launch_config(kernel: str, rows: int, device: torch.device) -> LaunchConfig:
    """The entry of the largest bucket that `rows` (M, >= 1) reaches."""
    if kernel in _trial:
        return _trial[kernel]
    buckets = _table()[architecture(device)][kernel]
    reached = [bucket for bucket in buckets if bucket < max(rows, 1).bit_length()]
    return buckets[max(reached)]


_trial: dict[str, LaunchConfig] = {}


@contextmanager
def trial(kernel: str, config: LaunchConfig) -> Iterator[None]:
    """Launch `kernel` with `config` while this is open, whatever the table says; for tuning."""
    _trial[kernel] = config
    try:
        yield
    finally:
        del _trial[kernel]


def fused_by_default(kernel: str, device: torch.device) -> bool:
    """Whether gemm="auto" takes this fused GEMM, "dual_gemm" or "gate_gemm", on this device."""
    chosen = FUSED | {arch: tuple(names) for arch, names in _tiles_file().get("fused", {}).items()}
    return kernel in chosen.get(architecture(device), ())


@cache
def _tiles_file() -> dict[str, Any]:
    """What the file in TOKENFLEX_TILES says, configurations read; empty where there is none."""
    path = os.environ.get(TILES_VARIABLE)
    if not path:
        return {}
    try:
        content = json.loads(Path(path).read_text())
        tiles = {
            arch: {
                kernel: {int(bucket): LaunchConfig(**config) for bucket, config in buckets.items()}
                for kernel, buckets in kernels.items()
            }
            for arch, kernels in content["tiles"].items()
        }
        return {"tiles": tiles, "fused": dict(content.get("fused", {}))}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{TILES_VARIABLE} names {path}, which is no table of launch configurations "
            f"({error!r}); write one with python -m kernels.tune, or unset the variable"
        ) from error


@cache
def _table() -> dict[str, dict[str, Buckets]]:
    """The shipped table, with the entries of the file in TOKENFLEX_TILES in place of its own."""
    read = _tiles_file().get("tiles", {})
    known: dict[str, dict[str, Buckets]] = dict.fromkeys(read, TABLE[SAFE_DEFAULT]) | TABLE
    return {
        arch: {
            name: {**buckets, **read.get(arch, {}).get(name, {})} for name, buckets in own.items()
        }
        for arch, own in known.items()
    }
