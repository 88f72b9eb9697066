"""Compiled kernels run on a CPU (ttsem): no access out of bounds, no race; and it would tell."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from kernels import launch
from tests.environments.python import python_in

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.multiprocess
PROGRAM = Path(__file__).with_name("sanitized.py")


@pytest.fixture(scope="module")
def python() -> str:
    return python_in("ttsem", "kernel-checks")


def sanitize(python: str, report: Path, root: Path = ROOT, *arguments: str) -> dict:
    """ttsem's report on the program, with the kernels that lie in `root`."""
    remove = {"TRITON_INTERPRET", launch.TILES_VARIABLE}
    environment = {key: value for key, value in os.environ.items() if key not in remove}
    command = [python, "-m", "ttsem.sanitize", "--json", str(report), str(PROGRAM)]
    process = subprocess.run(
        [*command, *(("--", *arguments) if arguments else ())],
        cwd=root,
        env=environment | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert report.exists(), process.stdout + process.stderr
    found = json.loads(report.read_text())
    return found | {"returncode": process.returncode, "text": process.stdout + process.stderr}


def test_no_fault_and_no_race_with_rows_of_several_blocks(python, tmp_path):
    found = sanitize(python, tmp_path / "report.json")
    assert found["verdict"] == "ok" and found["returncode"] == 0, found
    assert found["launches"] == 30 and found["races_unchecked"] == 0


def test_no_fault_at_the_flagships_widths(python, tmp_path):
    found = sanitize(python, tmp_path / "report.json", ROOT, "flagship")
    assert found["verdict"] == "ok" and found["returncode"] == 0, found
    assert (
        found["launches"] == 30 and found["races_unchecked"] <= 8
    )  # fused GEMMs: too many accesses


BROKEN = {  # file, what stands there, what instead, file that is named
    "row": ("row_blocks", ", mask=channels < C)\n", ")\n", "row_blocks.py"),
    "swiglu": ("swiglu", "mask = at < total", "mask = at >= 0", "swiglu.py"),
    "column sum": ("column_sum", "axis=0), mask=column < columns)", "axis=0))", "column_sum.py"),
    "dual GEMM": ("dual_gemm", "mask = (r < M)[:, None]", "mask = (r >= 0)[:, None]", "dual_gemm"),
    "gate GEMM": ("gate_gemm", "mask = (r < M)[:, None]", "mask = (r >= 0)[:, None]", "gate_gemm"),
    "two programs write one row": ("pool_backward", "at = patch.to", "at = (patch // 2).to", ""),
}


@pytest.mark.parametrize("file, there, instead, named", BROKEN.values(), ids=BROKEN)
def test_a_mask_that_lacks_is_found(file, there, instead, named, python, tmp_path):
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("*.pyc"))
    path = tmp_path / "kernels" / "triton_impl" / f"{file}.py"
    source = path.read_text()
    assert there in source
    path.write_text(source.replace(there, instead))
    found = sanitize(python, tmp_path / "report.json", tmp_path)
    assert found["verdict"] != "ok" and found["returncode"] != 0, found["text"]
    assert found["fault"], found["text"]
    assert named in json.dumps(found["fault"])
