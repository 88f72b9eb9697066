"""Launch configurations: a static table per architecture and number of rows.

Nothing is tuned at run time: the order of a sum follows the block sizes, so ranks that chose their
own blocks would no longer run the same bits. `python -m kernels.tune` measures this GPU and writes
a table; naming that file in TOKENFLEX_TILES, on every rank, puts its entries before these, in the
situations they were measured in.
"""

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

TILES_VARIABLE = "TOKENFLEX_TILES"
REACH = 4  # a measured entry serves from its own rows to this many times as many


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
SAFE_DEFAULT = "sm_80"  # fits the shared memory of everything newer
INTERPRETED = "sm_90"  # whose entries the interpreter runs


class MeasuredEntry(NamedTuple):
    """A measured entry; fused: a fused GEMM that was faster than cuBLAS and what follows it."""

    config: LaunchConfig
    fused: bool


def describe_target(device: torch.device) -> dict[str, str]:
    """What a table is measured on and for: architecture, name of the GPU, version of Triton."""
    import triton

    arch, name = "interpreter", device.type
    if device.type == "cuda":
        arch = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
        name = torch.cuda.get_device_name(device)
    return {"arch": arch, "device": name, "triton": triton.__version__}


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
    name = "sm_{}{}".format(*torch.cuda.get_device_capability(torch.device("cuda", index)))
    if name in TABLE:
        return name
    warnings.warn(
        f"no launch configurations for {name} ({torch.cuda.get_device_name(index)}): taking those "
        f"of {SAFE_DEFAULT}, which run but may be slow, where {TILES_VARIABLE} names no table that "
        "python -m kernels.tune wrote on this GPU",
        stacklevel=3,
    )
    return SAFE_DEFAULT


def launch_config(kernel: str, rows: int, like: Tensor, **sizes: object) -> LaunchConfig:
    """The entry for `rows` (M, >= 1): of those measured and shipped, the one that starts closest.

    like: a tensor with the device and dtype of the launch. sizes: what else its time depends on.
    """
    if kernel in _trial:
        config, asked = _trial[kernel]
        asked.append((rows, _situation(like, sizes)))
        return config
    start, shipped = shipped_config(kernel, rows, like.device)
    found = _measured_entry(kernel, rows, like, sizes)
    return found[1].config if found and found[0] >= start else shipped


def shipped_config(kernel: str, rows: int, device: torch.device) -> tuple[int, LaunchConfig]:
    """The shipped entry of the largest bucket that `rows` reaches, after its fewest rows."""
    buckets = TABLE[architecture(device)][kernel]
    bucket = max(bucket for bucket in buckets if bucket < max(rows, 1).bit_length())
    return 1 << bucket, buckets[bucket]


def fused_by_default(kernel: str, rows: int, like: Tensor, **sizes: object) -> bool:
    """Whether gemm="auto" takes this fused GEMM: where its entry for M won when it was measured.

    No shipped entry has been measured to beat cuBLAS and an elementwise kernel yet.
    """
    found = _measured_entry(kernel, rows, like, sizes)
    return found is not None and found[1].fused


def _measured_entry(
    kernel: str, rows: int, like: Tensor, sizes: Mapping[str, object]
) -> tuple[int, MeasuredEntry] | None:
    if not os.environ.get(TILES_VARIABLE):
        return None
    entries = _measured(kernel, like.device, _situation(like, sizes))
    return max(
        ((start, entry) for start, entry in entries if start <= rows <= REACH * start),
        default=None,
        key=itemgetter(0),
    )


_trial: dict[str, tuple[LaunchConfig, list[tuple[int, str]]]] = {}


@contextmanager
def trial(kernel: str, config: LaunchConfig) -> Iterator[list[tuple[int, str]]]:
    """Launch `kernel` with `config` while this is open, whatever the tables say; for tuning.

    Yields a list that gets the M and the situation that each of its launches looks up.
    """
    _trial[kernel] = config, []
    try:
        yield _trial[kernel][1]
    finally:
        del _trial[kernel]


def _situation(like: Tensor, sizes: Mapping[str, object]) -> str:
    """The dtype and the sizes, "bfloat16 C=1152", for one."""
    dtype = str(like.dtype).removeprefix("torch.")
    return " ".join([dtype, *(f"{key}={size}" for key, size in sizes.items())])


@cache  # warns once about a situation
def _measured(kernel: str, device: torch.device, situation: str) -> list[tuple[int, MeasuredEntry]]:
    """The rows and entries measured for this kernel in this situation on such a device."""
    situations = _tiles_file(device).get(kernel, {})
    if situations and situation not in situations:
        warnings.warn(
            f"the table in {TILES_VARIABLE} has {kernel} measured for "
            f"{'; '.join(sorted(situations))}, not for {situation}, which runs as shipped; "
            "python -m kernels.tune --shape measures it",
            stacklevel=5,
        )
    return list(situations.get(situation, {}).items())


@cache
def _tiles_file(device: torch.device) -> dict[str, dict[str, dict[int, MeasuredEntry]]]:
    """Kernel -> situation -> rows -> entry of the file in TOKENFLEX_TILES.

    Warns where it was measured on something else; on another architecture nothing of it is taken.
    """
    path = os.environ[TILES_VARIABLE]
    found: dict[str, dict[str, dict[int, MeasuredEntry]]] = {}
    try:
        content = json.loads(Path(path).read_text())
        target = {key: content["target"][key] for key in ("arch", "device", "triton")}
        for record in content["measured"]:
            entry = MeasuredEntry(LaunchConfig(**record["kept"]), record["fused"])
            rows = found.setdefault(record["kernel"], {}).setdefault(record["situation"], {})
            rows[int(record["rows"])] = entry
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{TILES_VARIABLE} names {path}, which is no table of launch configurations "
            f"({error!r}); write one with python -m kernels.tune, or unset the variable"
        ) from error
    here = describe_target(device)
    if target != here:
        refused = target["arch"] != here["arch"]
        warnings.warn(
            f"{TILES_VARIABLE} names {path}, measured on {target}; this is {here}: "
            + ("none of it is used" if refused else "it is used, but may be slow")
            + "; python -m kernels.tune measures this one",
            stacklevel=6,
        )
        return {} if refused else found
    return found
