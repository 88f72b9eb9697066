"""slurm/pretrain.sh with the trainer itself, on a real cluster, through three kinds of fault."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import NODES, ROOT, Cluster
from tests.slurm.test_node_faults import IMPATIENT, frozen, wait_for_end_of_run
from tests.slurm.test_restart import FAST

pytestmark = pytest.mark.slurm
STEPS = 24


def settings(corpus: Path, run: Path) -> list[str]:
    return [
        "training/configs/digits.yaml",
        f"output_dir={run}",
        f"train.steps={STEPS}",
        "train.precision=fp32",
        "checkpoint.every_steps=2",
        "faults.step_timeout_s=8",
        "data.prepare=null",
        f"data.shards=[{corpus}/train]",
        "data.eval_shards=[]",
        f"data.tokenizer={corpus}/tokenizer.model",
        "deepspeed.param_persistence_threshold=0",
    ]


def losses(run: Path) -> dict[int, float]:
    path = run / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {row["step"]: row["loss"] for row in rows}


def start_without_slurm(arguments: list[str]) -> subprocess.Popen[str]:
    """The same run on two ranks that no fault meets."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "training.train", *arguments],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if not k.startswith("SLURM")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def tasks_of(cluster: Cluster, job: int) -> dict[int, int]:
    """The running trainer of every rank of a job: its process."""
    found = {}
    for process in cluster.processes():
        with contextlib.suppress(OSError):  # ended meanwhile
            text = Path(f"/proc/{process}/environ").read_bytes().decode()
            environment = dict(line.split("=", 1) for line in text.split("\0") if "=" in line)
            command = Path(f"/proc/{process}/cmdline").read_bytes()
            if environment.get("SLURM_JOB_ID") == str(job) and command.startswith(
                f"{sys.executable}\0-m\0training.train".encode()
            ):
                found[int(environment["SLURM_PROCID"])] = process
    return found


def test_the_trainer_survives_faults(cluster: Cluster, tmp_path: Path, digits_corpus: Path) -> None:
    """A killed rank, a signal, then a frozen node: the losses are those of a quiet run."""
    env = {"PYTHON": sys.executable, **FAST, **IMPATIENT}
    job = cluster.submit("slurm/pretrain.sh", *settings(digits_corpus, tmp_path / "run"), env=env)

    def wait_for_step(step: int) -> None:
        deadline = time.monotonic() + 90
        while max(losses(tmp_path / "run"), default=0) < step:
            assert time.monotonic() < deadline, cluster.logs(job)
            time.sleep(0.05)

    wait_for_step(5)
    os.kill(tasks_of(cluster, job)[1], signal.SIGKILL)
    wait_for_step(10)
    cluster.run("scancel", "--batch", "--signal=USR1", str(job))
    wait_for_step(15)
    with frozen(cluster, NODES[1]):
        # The watchdog ends the other rank, the script leaves the node.
        quiet = start_without_slurm(settings(digits_corpus, tmp_path / "quiet"))
        cluster.wait_for(job, "a node has not ended its tasks 7 s after the first", timeout=40)
        # By the script, which finds that the node does not answer, or by Slurm (SlurmdTimeout).
        wait_for_end_of_run(cluster, job)
    log = cluster.wait(job, timeout=120).log
    assert "restart 1 of at most" in log and "requeued; it goes on at step" in log
    assert "error: rank 0 on" in log and "made no progress for 8 s" in log
    assert f"no answer from {NODES[1]}" in log or "DUE TO NODE FAILURE" in log
    said, _ = quiet.communicate(timeout=60)
    assert quiet.returncode == 0, said
    assert losses(tmp_path / "run") == losses(tmp_path / "quiet")
    assert sorted(losses(tmp_path / "run")) == list(range(1, STEPS + 1))
