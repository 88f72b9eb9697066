"""slurm/profile_projector.sh: its help, what it refuses, and a run on a real cluster."""

import os
import subprocess
import sys

import pytest

from tests.slurm.cluster import ROOT, Cluster

PROFILE = "slurm/profile_projector.sh"


def test_help_and_a_start_outside_a_job() -> None:
    outside = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    shown = subprocess.run([ROOT / PROFILE, "--help"], capture_output=True, text=True, env=outside)
    assert shown.returncode == 0 and shown.stdout.startswith("Usage")
    refused = subprocess.run([ROOT / PROFILE], capture_output=True, text=True, env=outside)
    assert refused.returncode == 2
    assert "not in a Slurm job" in refused.stderr and "sbatch" in refused.stderr


@pytest.mark.slurm
def test_arguments_reach_the_profile_and_its_exit_code_the_job(cluster: Cluster) -> None:
    environment = {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    arguments = ("--shape", "T=64,n=12")
    job = cluster.submit(PROFILE, *arguments, nodes=1, env=environment)
    bad = cluster.submit(PROFILE, "--shape", "T=64", nodes=1, env=environment)
    log = cluster.wait(job, timeout=90).log
    assert "nothing was timed" in log and "T=64,n=12,pool=adaptive" in log
    ended = cluster.wait(bad, timeout=90, state="FAILED")
    assert ended.exit_code == 2 and "no side n in 'T=64'" in ended.log
