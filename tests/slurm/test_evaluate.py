"""slurm/evaluate.sh: its help, what it refuses, and an evaluation on two nodes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import ROOT, Cluster
from tests.training.exported import make_folder

EVALUATE = "slurm/evaluate.sh"


def test_help_and_a_start_outside_a_job() -> None:
    outside = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    shown = subprocess.run([ROOT / EVALUATE, "--help"], capture_output=True, text=True, env=outside)
    assert shown.returncode == 0 and shown.stdout.startswith("Usage")
    refused = subprocess.run([ROOT / EVALUATE], capture_output=True, text=True, env=outside)
    assert refused.returncode == 2
    assert "not in a Slurm job" in refused.stderr and "sbatch" in refused.stderr


@pytest.mark.slurm
def test_two_nodes_share_the_samples_out_and_a_wrong_setting_is_not_started_again(
    cluster: Cluster, tmp_path: Path
) -> None:
    model, shards = make_folder(tmp_path, samples=12, steps=2)
    out = tmp_path / "out"
    environment = {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    arguments = (str(model), str(shards), "--out", str(out), "--latency-samples", "1")
    arguments += ("--batch-tokens", "150", "--num-image-tokens", "4")
    job = cluster.submit(EVALUATE, *arguments, env=environment)
    wrong = ("--budget", "speed=1")
    bad = cluster.submit(EVALUATE, *arguments, *wrong, nodes=1, env=environment)
    log = cluster.wait(job, timeout=150).log
    assert f"0: results  {out}/results.json" in log
    samples = []
    for rank in (0, 1):
        lines = (out / "rows" / f"4-rank{rank}.jsonl").read_text().splitlines()
        samples += [json.loads(line)["sample"] for line in lines]
        assert lines
    assert sorted(samples) == list(range(12))
    ended = cluster.wait(bad, timeout=150, state="FAILED")
    assert ended.exit_code == 2 and "--budget is 'speed=1'; give latency=50ms" in ended.log
    assert "restart 1" not in ended.log
