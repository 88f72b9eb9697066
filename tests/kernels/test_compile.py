"""Every shipped launch configuration compiles for every architecture, within the limits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import compile_report, launch
from kernels.compile_report import CompileResult, compile_all, format_report
from kernels.compile_specs import ARCHITECTURES, DTYPES, SPECS, jobs

ROOT = Path(__file__).parents[2]
MATRIX = {80: "mma", 90: "wgmma", 100: "tcgen05"}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[CompileResult]:
    """The whole report, from a process that does not interpret kernels."""
    path = tmp_path_factory.mktemp("report") / "report.json"
    remove = {"TRITON_INTERPRET", launch.TILES_VARIABLE}
    process = subprocess.run(
        [sys.executable, "-m", "kernels.compile_report", "--json", str(path)],
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if key not in remove},
        capture_output=True,
        text=True,
    )
    assert path.exists(), process.stdout + process.stderr
    return [CompileResult(**result) for result in json.loads(path.read_text())]


def test_every_entry_of_the_table_was_compiled(results):
    assert {f"sm_{arch}" for arch in ARCHITECTURES} == set(launch.TABLE)
    kernels = {name for entries in launch.TABLE.values() for name in entries}
    assert kernels == {job.name for job in jobs()}
    expected = {
        (job.name, job.arch, job.dtype, f"rows>={1 << job.bucket} C={job.channels}")
        for job in jobs()
    }
    found = {(r.kernel, r.arch, r.dtype, " ".join(r.config.split()[:2])) for r in results}
    assert found == expected


def test_nothing_is_beyond_a_limit(results):
    problems = {
        (result.kernel, result.dtype, result.arch, result.config): result.problems()
        for result in results
        if result.problems()
    }
    assert not problems


def test_the_fused_gemms_use_the_matrix_instructions_of_their_architecture(results):
    gemms = [result for result in results if result.kernel in ("dual_gemm", "gate_gemm")]
    assert gemms
    for result in gemms:
        assert result.matrix_instructions.split(" x")[0] == MATRIX[result.arch]


def sound(**changes) -> CompileResult:
    values = {
        "kernel": "norm",
        "dtype": "bf16",
        "arch": 80,
        "config": "rows>=1",
        "registers": 32,
        "stack_bytes": 0,
        "spill_loads": 0,
        "spill_stores": 0,
        "shared_bytes": 101376,
        "access_bytes": 16,
        "matrix_instructions": "",
        "varying": "",
        "seconds": 0.1,
    }
    return CompileResult(**(values | changes))


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"stack_bytes": 8}, "stack 8"),
        ({"spill_loads": 1}, "1 spills"),
        ({"spill_stores": 2}, "2 spills"),
        ({"shared_bytes": 101377}, "shared memory"),
        ({"arch": 90, "shared_bytes": 232449}, "shared memory"),
        ({"access_bytes": 2}, "wider than 2 bytes"),
        ({"varying": "tile_sides"}, "because of tile_sides"),
    ],
)
def test_what_is_beyond_a_limit_is_named(changes, problem):
    assert sound().problems() == []
    assert sound(arch=90, shared_bytes=232448).problems() == []
    assert any(problem in found for found in sound(**changes).problems())
    assert "OVER THE LIMIT" in format_report([sound(**changes)])


def test_the_report_has_a_line_per_result():
    lines = format_report([sound(), sound(kernel="column_sum")]).splitlines()
    assert len(lines) == 3
    assert lines[0].split()[:4] == ["kernel", "dtype", "sm", "regs"]
    assert lines[2].split()[:4] == ["column_sum", "bf16", "80", "32"]


def test_specs_name_known_dtypes_and_every_kernel():
    assert set(SPECS) == set(launch.TABLE[launch.SAFE_DEFAULT])
    assert all(dtype in DTYPES for spec in SPECS.values() for dtype in spec.dtypes)


def test_an_interpreting_process_is_refused(monkeypatch):
    monkeypatch.setattr(compile_report.triton.knobs.runtime, "interpret", True)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compile_all()
