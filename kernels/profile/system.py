"""The machine and the versions a measurement was made with, and what the GPU did meanwhile."""

import os
import platform
import statistics
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from kernels.gpu_datasheets import find_gpu
from kernels.launch import TILES_VARIABLE

PACKAGES = ("triton", "liger_kernel", "quack-kernels", "transformer_engine")
SAMPLED = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
THROTTLE_FIELDS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")  # new, old
# Bits of both. Left out: 1, an idle GPU, and 2, 0x10 and 0x100, clocks set by somebody.
THROTTLE_REASONS = {
    **{0x4: "power cap", 0x8: "hardware slowdown", 0x20: "thermal, software"},
    **{0x40: "thermal, hardware", 0x80: "power brake"},
}
SAMPLE_MS = 200


def describe_machine(device: torch.device, command: list[str]) -> dict[str, Any]:
    """Versions, device, commit and command, for the JSON beside the numbers."""
    found: dict[str, Any] = {
        "command": " ".join(command),
        "commit": git_commit(),
        TILES_VARIABLE: os.environ.get(TILES_VARIABLE),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: _version(package) for package in PACKAGES},
        "cuda": torch.version.cuda,
        "device": "cpu",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = find_gpu(properties.name)
        found |= {
            "device": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "driver": _ask(device, "driver_version"),
            "power.limit": _ask(device, "power.limit"),
            "clocks.max.sm": _ask(device, "clocks.max.sm"),
            "datasheet": gpu and {"bf16_tflops": gpu.bf16_tflops, "tb_per_s": gpu.tb_per_s},
        }
    return found


@contextmanager
def watched(device: torch.device) -> Iterator[dict[str, Any]]:
    """Yields what, after the block, tells the GPU's clocks, power, heat and throttling in it.

    {field: [least, median, most]} of MHz, W and degrees, and "throttled": why clocks were held
    down. Empty on a CPU, and where `nvidia-smi`, which is asked five times a second, is not there.
    """
    found: dict[str, Any] = {}
    reason = device.type == "cuda" and next((f for f in THROTTLE_FIELDS if _ask(device, f)), None)
    if not reason:
        yield found
        return
    query = [*_query(device, ",".join((*SAMPLED, reason))), f"--loop-ms={SAMPLE_MS}"]
    with subprocess.Popen(query, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield found
        finally:
            process.terminate()
            printed = process.communicate()[0]
    found |= _summary([line.split(", ") for line in printed.splitlines()])


def _summary(lines: list[list[str]]) -> dict[str, Any]:
    # Whole ones: the last may be cut off, and a part of a GPU has no reasons.
    whole = [line for line in lines if len(line) > len(SAMPLED) and line[-1].startswith("0x")]
    found: dict[str, Any] = {}
    for field, column in zip(SAMPLED, zip(*whole, strict=True), strict=False):
        if values := [float(v) for v in column if v.replace(".", "", 1).isdigit()]:  # or [N/A]
            found[field] = [min(values), statistics.median(values), max(values)]
    bits = {bit for line in whole for bit in THROTTLE_REASONS if int(line[-1], 16) & bit}
    return found | {"throttled": [why for bit, why in THROTTLE_REASONS.items() if bit in bits]}


def _query(device: torch.device, fields: str) -> list[str]:
    """The command that prints these fields of this device; an index would be another GPU's where
    CUDA_VISIBLE_DEVICES is set."""
    uuid = str(getattr(torch.cuda.get_device_properties(device), "uuid", "")).removeprefix("GPU-")
    return [
        "nvidia-smi",
        f"--query-gpu={fields}",
        "--format=csv,noheader,nounits",
        f"--id=GPU-{uuid}",
    ]


def _ask(device: torch.device, field: str) -> str | None:
    return _output(_query(device, field))


def git_commit() -> str | None:
    """The commit of the code, with "+changes" where files differ from it; None outside git."""
    root = str(Path(__file__).resolve().parents[2])
    commit = _output(["git", "-C", root, "rev-parse", "HEAD"])
    if not commit:
        return None
    return commit + ("+changes" if _output(["git", "-C", root, "status", "--porcelain"]) else "")


def _output(command: list[str]) -> str | None:
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ran.stdout.strip() if ran.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
