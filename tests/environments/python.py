"""The Python in which an optional package is installed."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest


def python_with(package: str, environment: str) -> str:
    """This Python if it has the package, else that of the environment beside (`make extras`).

    Without both the test is skipped, or fails if REQUIRE_EXTRAS=1 says otherwise.
    """
    if importlib.util.find_spec(package) is not None:
        return sys.executable
    python = Path(f"{sys.prefix}-{environment}", "bin", "python")
    if (python.parents[1] / "installed").exists():
        return str(python)
    reason = f"{package} is not installed: run make extras"
    if os.environ.get("REQUIRE_EXTRAS") == "1":
        pytest.fail(f"{reason} (REQUIRE_EXTRAS=1)", pytrace=False)
    pytest.skip(reason)
