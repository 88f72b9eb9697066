"""The compile report with other versions of Triton: python -m tests.kernels.compile_matrix

Writes what is beyond a limit with each of them to kernels/results/compile_matrix.json.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from kernels import launch
from kernels.compile_report import CompileResult

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "kernels" / "results" / "compile_matrix.json"
ENVIRONMENTS = ("triton36", "ttsem")  # of make kernel-checks, beside the project's own


def compile_with(python: str) -> tuple[str, dict[str, Any]]:
    """The version of Triton that this Python has, and what its compile report says."""
    remove = {"TRITON_INTERPRET", launch.TILES_VARIABLE}
    environment = {key: value for key, value in os.environ.items() if key not in remove}

    def run(*arguments: str) -> str:
        process = subprocess.run(
            [python, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        return process.stdout if process.returncode == 0 else process.stdout + process.stderr

    version = run("-c", "import triton; print(triton.__version__)").strip()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        printed = run("-m", "kernels.compile_report", "--json", str(path))
        if not path.exists():
            raise RuntimeError(f"no compile report with Triton {version}:\n{printed[-3000:]}")
        results = [CompileResult(**result) for result in json.loads(path.read_text())]
    return version, summary(results)


def summary(results: list[CompileResult]) -> dict[str, Any]:
    """How many configurations there are, and each that is beyond a limit."""
    beyond = [
        f"{result.kernel} {result.dtype} sm_{result.arch} {result.config}: {problem}"
        for result in results
        for problem in result.problems()
    ]
    return {"configurations": len(results), "beyond_a_limit": sorted(beyond)}


def main() -> None:
    pythons = [f"{sys.prefix}-{name}/bin/python" for name in ENVIRONMENTS]
    found = dict(compile_with(python) for python in (sys.executable, *pythons))
    RECORD.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n")
    print(RECORD.read_text())


if __name__ == "__main__":
    main()
