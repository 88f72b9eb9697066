"""What numbers were measured on: the machine, the versions and the commit."""

import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any


def measured_on(packages: Iterable[str]) -> dict[str, Any]:
    """Machine, load, Python, versions of packages and commit, to be recorded beside numbers."""
    return {
        "machine": machine(),
        "load_average": os.getloadavg()[0],  # whatever else the machine does shows in the numbers
        "python": platform.python_version(),
        "versions": versions(packages),
        "commit": git_commit(),
    }


def machine() -> str:
    """The GPUs, or the processor and the number of cores this process may use."""
    import torch  # late: what needs only `num_cores` starts sooner

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{cpu_model()}, {num_cores()} cores"


def cpu_model() -> str:
    """The processor's model, as far as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Package -> version, or that it is not installed."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def git_commit(folder: Path | None = None) -> str | None:
    """The commit of a folder (of this code), "+changes" where files differ; None outside git."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"],
            cwd=folder or Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()
