"""The machine and the versions a measurement was made with."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from kernels.gpu_datasheets import find_gpu
from kernels.launch import TILES_VARIABLE

_SMI_FIELDS = (
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "power.draw",
    "power.limit",
    "temperature.gpu",
)


def describe_machine(device: torch.device, command: list[str]) -> dict[str, Any]:
    """Versions, device, commit and command, for the JSON beside the numbers."""
    found: dict[str, Any] = {
        "command": " ".join(command),
        "commit": git_commit(),
        TILES_VARIABLE: os.environ.get(TILES_VARIABLE),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "liger_kernel": _version("liger_kernel"),
        "cuda": torch.version.cuda,
        "device": "cpu",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "driver": (nvidia_smi(device, ("driver_version",)) or {}).get("driver_version"),
            "datasheet": datasheet(properties.name),
        }
    return found


def datasheet(name: str) -> dict[str, float] | None:
    """What the vendor states for a GPU of this name, or None."""
    gpu = find_gpu(name)
    return {"bf16_tflops": gpu.bf16_tflops, "tb_per_s": gpu.tb_per_s} if gpu else None


def clocks(device: torch.device) -> dict[str, str] | None:
    """Clocks, power and temperature at this moment, as nvidia-smi prints them, or None."""
    return nvidia_smi(device, _SMI_FIELDS) if device.type == "cuda" else None


def nvidia_smi(device: torch.device, fields: tuple[str, ...]) -> dict[str, str] | None:
    """What `nvidia-smi` says about this device, or None where it cannot be asked."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    if uuid is None:  # an index would be another GPU's where CUDA_VISIBLE_DEVICES is set
        return None
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    printed = _output([*query, f"--id=GPU-{str(uuid).removeprefix('GPU-')}"])
    if not printed:
        return None
    return dict(zip(fields, (value.strip() for value in printed.split(",")), strict=False))


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
