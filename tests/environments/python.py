"""The Python in which an optional package, or another release of one, is installed."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest


def python_with(package: str, environment: str) -> str:
    """This Python if it has the package, else that of the environment beside (`make extras`)."""
    if importlib.util.find_spec(package) is not None:
        return sys.executable
    return python_in(environment, "extras")


def python_in(environment: str, make: str) -> str:
    """The Python of an environment that `make` installs: "extras" or "kernel-checks".

    Without it the test is skipped, or fails if REQUIRE_EXTRAS=1 (REQUIRE_KERNEL_CHECKS=1) says so.
    """
    python = Path(f"{sys.prefix}-{environment}", "bin", "python")
    if (python.parents[1] / "installed").exists():
        return str(python)
    variable = f"REQUIRE_{make.upper().replace('-', '_')}"
    reason = f"{environment} is not installed: run make {make}"
    if os.environ.get(variable) == "1":
        pytest.fail(f"{reason} ({variable}=1)", pytrace=False)
    pytest.skip(reason)
