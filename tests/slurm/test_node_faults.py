"""slurm/pretrain.sh when a node freezes, a job of higher priority wants the nodes, or host memory
runs out, on a real cluster.

A small program stands in for the trainer (test_restart.py).
"""

import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm import cluster as cluster_module
from tests.slurm.cluster import NODES, Cluster
from tests.slurm.test_restart import FAST, STAND_IN, starts, wait_for_start

pytestmark = pytest.mark.slurm
PRETRAIN = "slurm/pretrain.sh"
DIGITS = "training/configs/digits.yaml"
# Slurm's KillWait is 5 s here: a node that is well has ended its tasks by then.
IMPATIENT = {"TASKS_END_S": "7", "NODE_CHECK_S": "3"}


def program(folder: Path, text: str) -> dict[str, str]:
    """The environment in which pretrain.sh runs this program instead of Python."""
    path = folder / "program"
    path.write_text(text)
    path.chmod(0o755)
    return {"PYTHON": str(path), "STAND_IN": str(folder / "step"), **FAST}


@pytest.fixture
def stand_in(tmp_path: Path) -> dict[str, str]:
    """The environment in which pretrain.sh runs the stand-in."""
    return program(tmp_path, STAND_IN)


# --- a node freezes


@contextlib.contextmanager
def frozen(cluster: Cluster, node: str, daemon: bool = True) -> Iterator[None]:
    cluster.freeze_node(node, daemon)
    try:
        yield
    finally:
        cluster.thaw_node(node)


def wait_for_end_of_run(cluster: Cluster, job: int) -> None:
    deadline = time.monotonic() + 60
    while cluster.job(job)["JobState"] == "RUNNING":
        assert time.monotonic() < deadline, cluster.logs(job)
        time.sleep(0.2)


def test_frozen_tasks_do_not_hang_the_job(cluster: Cluster, stand_in: dict[str, str]) -> None:
    """Their node answers Slurm, which therefore never finds it down: srun would wait for ever."""
    job = cluster.submit(PRETRAIN, DIGITS, "steps=6000", env={**stand_in, **IMPATIENT})
    ranks = [wait_for_start(cluster, job, rank) for rank in (0, 1)]
    with frozen(cluster, NODES[1], daemon=False):
        os.kill(int(ranks[0]["pid"]), signal.SIGKILL)  # as the watchdog of rank 0 ends it
        cluster.wait_for(job, "a node has not ended its tasks 7 s after the first", timeout=20)
        cluster.wait_for(job, "requeued; it goes on at step", timeout=20)
    log = cluster.wait(job).log
    assert [start["restart"] for start in starts(log, 0)] == [0, 1]
    assert starts(log, 0)[1]["step"] > 0


def test_a_frozen_batch_host_requeues_the_job(cluster: Cluster, stand_in: dict[str, str]) -> None:
    """The script is frozen too: Slurm finds the node down (SlurmdTimeout) and requeues the job."""
    job = cluster.submit(PRETRAIN, DIGITS, "steps=6000", env=stand_in)
    wait_for_start(cluster, job, 1)
    with frozen(cluster, NODES[0]):
        wait_for_end_of_run(cluster, job)
    log = cluster.wait(job).log
    first, second = starts(log, 0)
    assert (first["restart"], second["restart"]) == (0, 1)
    assert second["step"] >= first["step"]


# --- a job of higher priority wants the nodes


@contextlib.contextmanager
def preemption(cluster: Cluster, mode: str, told: str) -> Iterator[None]:
    """Jobs of the partition `spare` are told by SIGTERM or by their own --signal, 20 s ahead."""
    before = (cluster.folder / "slurm.conf").read_text()
    changed = before.replace("spare PreemptMode=REQUEUE", f"spare PreemptMode={mode} GraceTime=20")
    if told != "SIGTERM":
        changed += "SlurmctldParameters=preempt_send_user_signal\n"
    try:
        cluster.reconfigure(changed)
        yield
    finally:
        cluster.reconfigure(before)


def submit_urgent(cluster: Cluster, folder: Path) -> int:
    script = folder / "urgent.sh"
    script.write_text("#!/bin/bash\ndate +%s.%N\n")
    return cluster.submit(script, options=["--partition=urgent", "--exclusive"])


def preempted(cluster: Cluster, folder: Path, env: dict[str, str]) -> str:
    """The log of a job that an urgent one preempts; that one need not wait for the whole 20 s."""
    options = ["--partition=spare"]
    job = cluster.submit(PRETRAIN, DIGITS, "steps=6000", env=env, options=options)
    wait_for_start(cluster, job, 0)
    asked = time.time()
    urgent = cluster.wait(submit_urgent(cluster, folder))
    assert float(urgent.log) - asked < 10
    return cluster.wait(job).log


@pytest.mark.parametrize("told", ["SIGTERM", "SIGUSR1"])
def test_a_preempted_job_saves_once_and_goes_on(
    cluster: Cluster, stand_in: dict[str, str], tmp_path: Path, told: str
) -> None:
    with preemption(cluster, "REQUEUE", told):
        log = preempted(cluster, tmp_path, stand_in)
    assert re.findall(r"0: stopped by (\w+) at step (\d+)", log) == [
        (told, str(starts(log, 0)[1]["step"]))  # no step is lost
    ]
    for rank in (0, 1):
        assert [start["restart"] for start in starts(log, rank)] == [0, 1]
    assert "Slurm wants the nodes for a job of higher priority" in log
    assert "given up" not in log and "restart 1 of at most" not in log


def test_a_job_preempted_while_its_nodes_are_checked_is_not_lost(
    cluster: Cluster, stand_in: dict[str, str], tmp_path: Path
) -> None:
    """Nor where Slurm would cancel it at the end of the grace time."""
    with preemption(cluster, "CANCEL", "SIGTERM"):
        log = preempted(cluster, tmp_path, {**stand_in, "PREFLIGHT": "1"})
    assert re.findall(r"0: stopped by (\w+) ", log) == ["SIGTERM"]
    assert [start["restart"] for start in starts(log, 0)] == [0, 1, 1]  # the check, then training


# --- host memory runs out


@pytest.mark.parametrize(
    ("death", "first", "code", "explained"),
    [
        ("kill -KILL $$", "Killed", 137, True),
        ("bash -c 'kill -KILL $$'; exit $?", "Exited with exit code 137", 137, True),
        (
            # srun may drop the last words of a task while it ends the others.
            f"ulimit -v 300000; {sys.executable} -c 'bytearray(1 << 30)'; c=$?; sleep 1; exit $c",
            "Exited with exit code 1",
            1,
            False,
        ),
    ],
    ids=["killed", "killed in a container", "refused by the kernel"],
)
def test_the_log_explains_a_killed_task(
    cluster: Cluster, tmp_path: Path, death: str, first: str, code: int, explained: bool
) -> None:
    dying = program(tmp_path, f"#!/bin/bash\n((SLURM_PROCID)) || exec sleep 60\n{death}\n")
    job = cluster.submit(PRETRAIN, env={**dying, "MAX_RESTARTS_WITHOUT_PROGRESS": "0"})
    ended = cluster.wait(job, state="FAILED")
    assert f"first: {NODES[1]}: task 1: {first}" in ended.log
    assert ("when the node is out of host memory" in ended.log) == explained
    assert ("1: MemoryError" in ended.log) != explained
    assert ended.exit_code == code and "given up" in ended.log


CGROUP = Path("/sys/fs/cgroup/memory")
# Rank 1 takes 400 MB at its first start, soon after it began.
GREEDY = STAND_IN.replace(
    "while not stop",
    """if rank == 1 and not saved.with_suffix(".greedy").exists():
    saved.with_suffix(".greedy").touch()
    time.sleep(1)
    print(len(b"x" * (400 << 20)), flush=True)
while not stop""",
)


@pytest.fixture
def limiting_cluster(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, cluster: Cluster
) -> Iterator[Cluster]:
    """A cluster that keeps jobs to their memory with cgroups: the kernel kills what needs more."""
    if not os.access(CGROUP / "cgroup.procs", os.W_OK):
        pytest.skip(f"no memory cgroup (version 1) at {CGROUP} to write to")
    conf = cluster_module.SLURM_CONF.replace("task/none", "task/cgroup")
    monkeypatch.setattr(cluster_module, "SLURM_CONF", conf.replace("CR_Core", "CR_Core_Memory"))
    folder = tmp_path_factory.mktemp("limiting")
    (folder / "cgroup.conf").write_text(
        f"CgroupPlugin=cgroup/v1\nCgroupMountpoint={CGROUP.parent}\nConstrainRAMSpace=yes\n"
    )
    try:
        with Cluster(folder) as running:
            yield running
    finally:
        for node in NODES:
            with contextlib.suppress(OSError):
                (CGROUP / f"slurm_{node}").rmdir()


def test_the_kernel_kills_a_task_that_outgrows_the_jobs_memory(
    limiting_cluster: Cluster, tmp_path: Path
) -> None:
    env = program(tmp_path, GREEDY)
    options = ["--mem=200"]
    job = limiting_cluster.submit(PRETRAIN, DIGITS, "steps=30", env=env, options=options)
    log = limiting_cluster.wait(job).log  # COMPLETED: a later stage may follow
    assert f"first: {NODES[1]}: task 1: Out Of Memory" in log
    assert "host memory was too small. Ask sbatch for more (--mem=0" in log
    assert len(starts(log, 0)) == 2 and starts(log, 0)[1]["step"] > 0
    assert "0: done at step 30" in log
