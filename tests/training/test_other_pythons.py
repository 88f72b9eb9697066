"""The versions of Python: what `make setup` takes, and the demo's first steps on those at hand."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OTHERS = sorted(ROOT.glob(".venv-3.*[0-9]/bin/python"))


@pytest.mark.parametrize("minor", [10, 11, 12, 13, 14, 15])
def test_setup_takes_the_versions_that_the_pins_install_on(tmp_path, minor):
    """A stand-in for Python answers the version check and stops there."""
    python = tmp_path / "python"
    check = f"import sys; sys.version_info = (3, {minor}, 0); exec(sys.argv.pop(1))"
    python.write_text(
        "#!/bin/sh\n"
        f"case $2 in *version_info*) exec '{sys.executable}' -c '{check}' \"$2\";; esac\n"
        f"echo Python 3.{minor}; exit 3\n"
    )
    python.chmod(0o755)
    command = ["make", "setup", f"VENV={tmp_path}/venv", f"PYTHON={python}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    refused = f"error: Python 3.11 to 3.14 is needed, found Python 3.{minor}" in done.stdout
    assert done.returncode != 0 and refused == (minor in (10, 15)), done.stdout + done.stderr


@pytest.mark.multiprocess
@pytest.mark.skipif(not OTHERS, reason="no .venv-3.x: make setup VENV=.venv-3.13 PYTHON=python3.13")
@pytest.mark.parametrize("python", OTHERS, ids=lambda path: path.parts[-3])
def test_twenty_steps_on_two_ranks(tmp_path, python):
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    train = ("-m", "training.train", str(ROOT / "training" / "configs" / "digits.yaml"))
    done = subprocess.run(
        [str(python), *launch, *train, "train.steps=20"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"^step 20/20  loss \d", done.stdout, re.MULTILINE)
