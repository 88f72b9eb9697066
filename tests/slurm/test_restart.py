"""slurm/pretrain.sh when ranks die, nodes are lost, and signals arrive, on a real cluster.

A small program stands in for the trainer: it has steps, saves each of them, goes on from the last
one, and ends with the trainer's exit codes. test_trainer_faults.py runs the trainer itself.
"""

import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import NODES, Cluster

pytestmark = pytest.mark.slurm
PRETRAIN = "slurm/pretrain.sh"
DIGITS = "training/configs/digits.yaml"

# Argument: the steps to do, of 0.1 s; 10 after a requeue. Rank 1 does none and waits.
STAND_IN = f"""\
#!{sys.executable}
import os, signal, sys, time
from pathlib import Path

rank, last = int(os.environ["SLURM_PROCID"]), int(sys.argv[-1].split("=")[1])
saved, stop = Path(os.environ["STAND_IN"]), []
done = saved.with_suffix(".done")
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, frame: stop.append(signal.Signals(number).name))
step = int(saved.read_text()) if saved.exists() else 0
restart = os.environ.get("SLURM_RESTART_COUNT", "0")
last = step + 10 if restart != "0" else last
print(f"rank {{rank}} pid {{os.getpid()}} from step {{step}} port {{os.environ['MASTER_PORT']}} "
      f"restart {{restart}} at {{time.time():.2f}}", flush=True)
while not stop and not done.exists():
    time.sleep(0.1)
    step += 1
    if rank == 0:
        for file in (saved, Path(os.environ["PROGRESS_FILE"])):
            file.with_suffix(".new").write_text(str(step))
            file.with_suffix(".new").rename(file)
        if step >= last:
            print(f"done at step {{step}}", flush=True)
            done.touch()
if not done.exists():
    print(f"stopped by {{stop[0]}} at step {{step}}", flush=True)
    sys.exit(75)
"""
STARTED = re.compile(
    r"^(\d): rank \d pid (\d+) from step (\d+) port (\d+) restart (\d+) at ([\d.]+)", re.M
)
FAST = {"RESTART_WAIT_S": "0"}


@pytest.fixture
def stand_in(tmp_path: Path) -> dict[str, str]:
    """The environment in which pretrain.sh runs the stand-in."""
    path = tmp_path / "stand-in"
    path.write_text(STAND_IN)
    path.chmod(0o755)
    return {"PYTHON": str(path), "STAND_IN": str(tmp_path / "step"), **FAST}


def starts(log: str, rank: int) -> list[dict[str, int | float]]:
    """Every start of a rank: its process, step, port, Slurm's restart count and time."""
    names = ("pid", "step", "port", "restart", "at")
    found = [match.groups() for match in STARTED.finditer(log)]
    return [
        {
            name: float(value) if name == "at" else int(value)
            for name, value in zip(names, v, strict=True)
        }
        for r, *v in found
        if int(r) == rank
    ]


def wait_for_start(cluster: Cluster, job: int, rank: int, count: int = 1) -> dict[str, int | float]:
    """The `count`-th start of a rank, once it has saved a step or two."""
    deadline = time.monotonic() + 40
    while len(found := starts(cluster.log(job), rank)) < count:
        assert time.monotonic() < deadline, cluster.logs(job)
        time.sleep(0.05)
    time.sleep(0.4)
    return found[count - 1]


def notes_of(job: int) -> Path:
    return Path(PRETRAIN).resolve().parents[1] / "runs/.slurm" / str(job)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_starts_again_in_the_allocation(
    cluster: Cluster, stand_in: dict[str, str], rank: int
) -> None:
    job = cluster.submit(PRETRAIN, DIGITS, "steps=30", env=stand_in)
    first = wait_for_start(cluster, job, rank)
    killed = time.time()
    os.kill(int(first["pid"]), signal.SIGKILL)
    log = cluster.wait(job).log
    again = starts(log, rank)[1]
    assert again["at"] - killed < 5
    assert again["step"] > 0 and again["restart"] == 0
    assert again["port"] != first["port"]
    assert f"first: {NODES[rank]}: task {rank}: Killed" in log
    assert "restart 1 of at most 3" in log and "0: done at step 30" in log
    assert not notes_of(job).exists()


def test_before_the_time_limit_the_job_is_requeued(
    cluster: Cluster, stand_in: dict[str, str]
) -> None:
    """A real time limit. Slurm looks at it every 30 s, so the signal comes at 5 to 35 s."""
    options = ["--time=1", "--signal=B:USR1@55"]
    job = cluster.submit(PRETRAIN, DIGITS, "steps=600", env=stand_in, options=options)
    log = cluster.wait(job, timeout=70).log
    stopped = int(re.findall(r"0: stopped by SIGUSR1 at step (\d+)", log)[0])
    for rank in (0, 1):
        assert f"{rank}: stopped by SIGUSR1 at step" in log
        assert [start["restart"] for start in starts(log, rank)] == [0, 1]
    assert [start["step"] for start in starts(log, 0)] == [0, stopped]  # none is lost
    assert f"requeued; it goes on at step {stopped}" in log
    assert f"done at step {stopped + 10}" in log and "restart 1 of at most" not in log
    assert not notes_of(job).exists()


def test_usr1_to_the_script_requeues_and_term_to_the_tasks_does_not(
    cluster: Cluster, stand_in: dict[str, str]
) -> None:
    job = cluster.submit(PRETRAIN, DIGITS, "steps=40", env=stand_in)
    wait_for_start(cluster, job, 0)
    cluster.run("scancel", "--signal=TERM", str(job))
    wait_for_start(cluster, job, 0, count=2)
    cluster.run("scancel", "--batch", "--signal=USR1", str(job))
    log = cluster.wait(job).log
    assert [start["restart"] for start in starts(log, 0)] == [0, 0, 1]
    stopped = re.findall(r"0: stopped by (\w+) at step (\d+)", log)
    assert [name for name, _ in stopped] == ["SIGTERM", "SIGUSR1"]
    assert [start["step"] for start in starts(log, 0)][1:] == [int(step) for _, step in stopped]
    assert "tasks ended with exit code 75" in log


# Saves step 7 and ends as the trainer does when it is asked to; is done at the second start.
ASKED = """\
#!/bin/bash
trap 'echo 7 >"$PROGRESS_FILE"; exit 75' USR1
echo "element $SLURM_ARRAY_TASK_ID id $SLURM_JOB_ID restart ${SLURM_RESTART_COUNT:-0} $4"
((${SLURM_RESTART_COUNT:-0})) || while true; do sleep 0.1; done
"""


def test_each_element_of_a_job_array_is_requeued(cluster: Cluster, tmp_path: Path) -> None:
    """One has the array's own id; one is told as --signal without "B:" does it, by its tasks."""
    path = tmp_path / "program"
    path.write_text(ASKED)
    path.chmod(0o755)
    arguments = (PRETRAIN, DIGITS, "output_dir=runs/%a")
    options = ["--array=0-1%2", "--time=5"]
    env = {"PYTHON": str(path)}
    array = cluster.submit(*arguments, nodes=1, options=options, env=env)
    elements = [f"{array}_{index}" for index in (0, 1)]
    for element, receiver in zip(elements, ((), ("--batch",)), strict=True):
        cluster.wait_for(element, "restart 0 output_dir")
        time.sleep(0.3)
        cluster.run("scancel", *receiver, "--signal=USR1", element)
    ids = set()
    for index, element in enumerate(elements):
        log = cluster.wait(element).log
        assert f"job {element}: requeued; it goes on at step 7" in log
        found = re.findall(r"element (\d) id (\d+) restart (\d) (\S+)", log)
        assert [(i, r, out) for i, _, r, out in found] == [
            (str(index), restart, f"output_dir=runs/{index}") for restart in "01"
        ]
        ids |= {int(job) for _, job, _, _ in found}
    assert array in ids and len(ids) == 2
    assert "of this array trains the same" not in log


def test_a_cancelled_job_stays_cancelled(cluster: Cluster, stand_in: dict[str, str]) -> None:
    job = cluster.submit(PRETRAIN, DIGITS, "steps=600", env=stand_in)
    wait_for_start(cluster, job, 1)
    started = time.monotonic()
    cluster.run("scancel", str(job))
    cluster.wait(job, timeout=20, state="CANCELLED")
    assert time.monotonic() - started < 10
    time.sleep(1)
    assert cluster.job(job)["JobState"] == "CANCELLED"
    assert cluster.job(job)["Restarts"] == "0"
    shutil.rmtree(notes_of(job))  # removed by a later job, after a month


@pytest.mark.parametrize(
    ("program", "starts", "code", "message"),
    [
        (
            "sleep 1; ((SLURM_PROCID)) && sleep 0.5; exit 7",
            4,
            7,
            "3 restarts in a row saved no checkpoint",
        ),
        ("((SLURM_PROCID)) && sleep 60; sleep 0.5; exit 2", 1, 2, ""),
        ("((SLURM_PROCID)) || sleep 60; sleep 0.5; exit 2", 1, 2, ""),
        (
            "((SLURM_PROCID)) || sleep 60; sleep 1; exit 76",
            4,
            76,
            "3 restarts in a row saved no checkpoint",
        ),
    ],
    ids=["crash loop", "bad input on rank 0", "bad input on rank 1", "stuck"],
)
def test_how_often_a_failing_program_is_started(
    cluster: Cluster, tmp_path: Path, program: str, starts: int, code: int, message: str
) -> None:
    path = tmp_path / "program"
    path.write_text(f"#!/bin/bash\necho up $MASTER_PORT\n{program}\n")
    path.chmod(0o755)
    job = cluster.submit(PRETRAIN, env={"PYTHON": str(path), **FAST})
    ended = cluster.wait(job, state="FAILED")
    assert ended.exit_code == code  # not that of a rank which Slurm ended because of another
    for rank in (0, 1):
        ports = re.findall(rf"^{rank}: up (\d+)", ended.log, re.M)
        assert len(ports) == len(set(ports)) == starts
    assert message in ended.log and "Traceback" not in ended.log
    assert not notes_of(job).exists()


def test_progress_between_crashes_starts_the_count_anew(cluster: Cluster, tmp_path: Path) -> None:
    path = tmp_path / "program"
    path.write_text(
        '#!/bin/bash\n((SLURM_PROCID)) && exec sleep 1\necho up; n=$(cat "$COUNT")\n'
        'echo $((n + 1)) >"$COUNT"; ((n % 2)) || echo "$n" >"$PROGRESS_FILE"; exit $((n < 8))\n'
    )
    path.chmod(0o755)
    (tmp_path / "count").write_text("0")
    env = {"PYTHON": str(path), "COUNT": str(tmp_path / "count"), **FAST}
    env["MAX_RESTARTS_WITHOUT_PROGRESS"] = "2"
    log = cluster.wait(cluster.submit(PRETRAIN, env=env), timeout=90).log
    assert log.count("0: up") == 9
    assert "restart 2 of at most 2" in log and "given up" not in log


def test_a_job_leaves_a_node_without_daemon(cluster: Cluster, stand_in: dict[str, str]) -> None:
    """Restarts would fail there one after the other, before Slurm finds out."""
    job = cluster.submit(PRETRAIN, DIGITS, "steps=600", env={**stand_in, "NODE_CHECK_S": "10"})
    ranks = [wait_for_start(cluster, job, rank) for rank in (0, 1)]
    cluster.kill_node(NODES[1], tasks=False)
    os.kill(int(ranks[1]["pid"]), signal.SIGKILL)
    try:
        cluster.wait_for(job, f"no answer from {NODES[1]}", timeout=20)
        cluster.wait_for(job, "requeued; it goes on at step", timeout=5)
    finally:
        cluster.start_node(NODES[1])
    log = cluster.wait(job, timeout=90).log
    assert [start["restart"] for start in starts(log, 0)] == [0, 1]
    assert "restart 1 of at most" not in log


def test_a_dead_node_requeues_the_job(cluster: Cluster, stand_in: dict[str, str]) -> None:
    """By Slurm itself, once it has found the node down (SlurmdTimeout, 20 s here)."""
    job = cluster.submit(PRETRAIN, DIGITS, "steps=6000", env=stand_in)
    wait_for_start(cluster, job, 1)
    cluster.kill_node(NODES[1])
    try:
        cluster.wait_for(job, "not requeued from here: Slurm is ending it", timeout=60)
    finally:
        cluster.start_node(NODES[1])
    log = cluster.wait(job, timeout=60).log
    first, second = starts(log, 0)
    assert (first["restart"], second["restart"]) == (0, 1)
    assert second["step"] > first["step"]
