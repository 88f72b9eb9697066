"""Whether Triton can launch a kernel here: at its first launch it builds its driver, in C.

That takes a C compiler, Python's headers, the library of the GPU's driver and a folder to write to,
none of which PyTorch itself needs.
"""

import os
import subprocess
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from kernels.launch import shipped_config, trial


@cache
def launch_obstacle(device: torch.device) -> str | None:
    """Why no kernel can be launched on this device, with the remedy; None if one was.

    Tried once per process; waits for the device.
    """
    return obstacle_of(lambda: launch_one(device))


def obstacle_of(launch: Callable[[], object]) -> str | None:
    """Why `launch` failed, with the remedy; None if it did not."""
    try:
        launch()
    except Exception as error:  # whatever compilers, file systems and drivers raise
        return f"Triton cannot launch a kernel: {_cause(error)}"
    return None


def launch_one(device: torch.device) -> None:
    """Launch one of the projector's kernels and look at what it wrote."""
    from kernels.triton_impl import swiglu

    ones = torch.ones(1, 16, device=device)
    with torch.cuda.device_of(ones), trial("swiglu", shipped_config("swiglu", 1, device)[1]):
        product = swiglu(ones, ones)
    if not torch.allclose(product, torch.nn.functional.silu(ones), atol=1e-4):
        raise RuntimeError("its result is wrong")


def _cause(error: Exception) -> str:
    """What went wrong and what to do about it."""
    found = " ".join(str(error).split())[:300] or type(error).__name__
    file = error.filename if isinstance(error, OSError) else None
    if "C compiler" in found or (file and file == os.environ.get("CC")):
        return f"there is no C compiler ({found}); install gcc, or set CC to one"
    if isinstance(error, subprocess.CalledProcessError):
        found = f"{error.cmd[0]} ended with status {error.returncode}"
        header = Path(sysconfig.get_path("include", "posix_prefix"), "Python.h")
        if not header.exists():
            return f"{header} is missing ({found}); install Python's headers (python3-dev)"
        return f"{found}; see what it printed"
    if "libcuda" in found or file == "/sbin/ldconfig":
        return f"{found}; run ldconfig, or set TRITON_LIBCUDA_PATH to the folder of libcuda.so.1"
    if isinstance(error, OSError):
        return f"{found}; set TRITON_CACHE_DIR to a folder that can be written"
    return f"{found} ({type(error).__name__}); see whether this Triton fits the driver and torch"
