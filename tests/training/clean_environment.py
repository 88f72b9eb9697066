"""A Python that has torch, transformers, pillow and what they require, and nothing else."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement

ALLOWED = ("torch", "transformers", "pillow")
_START = "import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p] + [{0!r}]\n"


def make_environment(folder: Path) -> Path:
    """A folder of links to the installed packages that `ALLOWED` needs, and to no other."""
    for name in _closure(ALLOWED):
        installed = importlib.metadata.distribution(name)
        tops = {Path(file).parts[0] for file in installed.files or ()}
        for top in tops - {"..", "__pycache__", "bin"}:
            target = Path(str(installed.locate_file(top)))
            if target.exists() and not (folder / top).exists():
                (folder / top).symlink_to(target)
    return folder


def _closure(names: tuple[str, ...]) -> set[str]:
    """Names of these distributions and all that they require, optional extras left out."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name in found:
            continue
        found.add(name)
        for text in importlib.metadata.requires(name) or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return found


def run_there(environment: Path, script: str, cwd: Path, *arguments: str) -> str:
    """Run a script in the environment, away from this repository; returns its standard output."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH",)}
    result = subprocess.run(
        [sys.executable, "-I", "-c", _START.format(str(environment)) + script, *arguments],
        cwd=cwd,
        env={**kept, "HF_HOME": str(cwd / "hub"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout
