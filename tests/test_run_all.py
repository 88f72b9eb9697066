"""tests/run_all.sh, which `make test` runs: what it hands on to pytest, and when it fails."""

import os
import subprocess
from pathlib import Path

import pytest

RUN_ALL = Path(__file__).resolve().with_name("run_all.sh")
# Stands in for Python: tells its arguments, and ends as the run of these tests is said to.
PYTEST = """\
#!/bin/bash
printf '<%s>' "$@"; echo
[[ $* == *"not slurm"* ]] && exit "$OTHERS" || exit "$SLURM"
"""


@pytest.mark.parametrize(
    ("others", "slurm", "good"),
    [
        ("0", "0", True),
        ("0", "5", True),  # 5: none was selected
        ("5", "0", True),
        ("5", "5", False),
        ("1", "0", False),
        ("0", "1", False),
        ("2", "5", False),
        ("137", "0", False),
        ("0", "55", False),
    ],
)
def test_it_fails_if_a_run_failed_or_none_found_a_test(
    tmp_path: Path, others: str, slurm: str, good: bool
) -> None:
    python = tmp_path / "python"
    python.write_text(PYTEST)
    python.chmod(0o755)
    env = os.environ | {"OTHERS": others, "SLURM": slurm}
    command = ["bash", RUN_ALL, python, "-k", "name or other"]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (run.returncode == 0) == good
    assert "<-m><slurm><-k><name or other>\n" in run.stdout
    assert "<-m><not slurm><-k><name or other>\n" in run.stdout
