"""This checkout is run in place: pip says so, and `kernels` is ours in it alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("arguments", [("install",), ("install", "-e"), ("wheel",)])
def test_pip_gives_one_clear_message(tmp_path, arguments):
    """Not in this checkout itself: pip would write into it if it built anything."""
    for name in ("pyproject.toml", "build_backend.py"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    command = [sys.executable, "-m", "pip", *arguments, ".", "--no-deps", "--no-index"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    shown = done.stdout + done.stderr
    assert done.returncode == 1 and "Traceback" not in shown
    assert "error: this project is not a package to install" in shown
    assert "pip install -r requirements.txt" in shown


def test_transformers_takes_ours_for_no_kernels_of_hugging_face(tmp_path):
    """A `kernels` of a version that transformers uses, installed; ours comes before it."""
    for name in ("kernels", "kernels-0.18.2.dist-info"):
        (tmp_path / name).mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    metadata = "Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n"
    (tmp_path / "kernels-0.18.2.dist-info" / "METADATA").write_text(metadata)
    available = "from transformers.utils.import_utils import is_kernels_available as found;"
    ours = "import kernels, training.model.build; print(found(), kernels.POOL_MODES != ())"
    for folder, code, expected in (
        (ROOT, ours, "False True"),
        (tmp_path, "print(found())", "True"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", available + code],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.strip() == expected
