"""slurm/preflight.sh: what it checks and prints, and that it names a bad node in time."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import NODES, ROOT, Cluster
from training import exit_codes
from training.preflight.phases import BAD_NODE, clock_problem, judge, node_of

PREFLIGHT = "slurm/preflight.sh"
DIGITS = "training/configs/digits.yaml"


def settings(corpus: Path, folder: Path) -> list[str]:
    return [
        DIGITS,
        f"output_dir={folder}/run",
        "data.prepare=null",
        f"data.shards=[{corpus}/train]",
        f"data.tokenizer={corpus}/tokenizer.model",
    ]


def python_with(folder: Path, on_second_node: str) -> dict[str, str]:
    """A Python that first runs these lines of bash where it is on the second node."""
    path = folder / "python"
    path.write_text(
        f"#!/bin/bash\nif [[ ${{SLURMD_NODENAME:-}} == {NODES[1]} ]]; then\n{on_second_node}\nfi\n"
        f'exec {sys.executable} "$@"\n'
    )
    path.chmod(0o755)
    return {"PYTHON": str(path), "PREFLIGHT_TIMEOUT_S": "30"}


@pytest.mark.slurm
def test_good_nodes_pass(cluster: Cluster, tmp_path: Path, digits_corpus: Path) -> None:
    env = {"PYTHON": sys.executable}
    job = cluster.submit(PREFLIGHT, *settings(digits_corpus, tmp_path), env=env)
    log = cluster.wait(job).log
    for rank, node in enumerate(NODES):
        assert any(
            line.split()[1:4] == [node, str(rank), "CPU"] and line.endswith("GiB  240 samples")
            for line in log.splitlines()
        ), log
    assert "0: all-reduce of 16 MiB over 2 ranks (gloo): " in log
    assert "0: all is well after" in log
    assert not list((tmp_path / "run").iterdir())  # nothing left behind


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('set -- "${@/output_dir=*/output_dir=/proc/none}"', "output_dir /proc/none: "),
        ('set -- "${@/output_dir=*/output_dir=$OTHER}"', "output_dir "),
        ("export PYTHONPATH=$OTHER", "its clock is 7"),
        ("exec sleep 100", "rank 1 gave no report (nodes)"),
    ],
    ids=["cannot write", "other folder", "clock", "hangs"],
)
def test_a_bad_node_is_named(
    cluster: Cluster, tmp_path: Path, digits_corpus: Path, bad: str, message: str
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other/sitecustomize.py").write_text(
        "import time\nreal = time.time\ntime.time = lambda: real() + 79.9\n"
    )
    env = {**python_with(tmp_path, bad), "OTHER": str(tmp_path / "other")}
    started = time.monotonic()
    job = cluster.submit(PREFLIGHT, *settings(digits_corpus, tmp_path), env=env)
    ended = cluster.wait(job, state="FAILED")
    assert time.monotonic() - started < 35
    assert f"error: node {NODES[1]}: {message}" in ended.log
    assert f"node {NODES[0]}: " not in ended.log
    assert ended.exit_code == BAD_NODE


@pytest.mark.slurm
def test_before_training_it_keeps_bad_settings_from_starting(
    cluster: Cluster, tmp_path: Path, digits_corpus: Path
) -> None:
    """PREFLIGHT=1 of slurm/pretrain.sh; a shard that no node can read is a setting's fault."""
    env = {"PYTHON": sys.executable, "PREFLIGHT": "1"}
    arguments = [*settings(digits_corpus, tmp_path), f"data.shards=[{tmp_path}/missing]"]
    job = cluster.submit("slurm/pretrain.sh", *arguments, env=env)
    ended = cluster.wait(job, state="FAILED")
    assert ended.exit_code == exit_codes.BAD_INPUT
    assert f"{tmp_path}/missing" in ended.log
    assert "step 1/" not in ended.log and "restart" not in ended.log.split("rendezvous")[1]


def test_a_single_process_needs_no_slurm(tmp_path: Path, digits_corpus: Path) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "MASTER"))}
    command = [sys.executable, "-m", "training.preflight", *settings(digits_corpus, tmp_path)]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "all is well" in run.stdout
    shown = subprocess.run([*command, "--settings"], cwd=ROOT, env=env, capture_output=True)
    assert f"output_dir: {tmp_path}/run" in shown.stdout.decode()


def report(rank: int, **changes: object) -> dict[str, object]:
    ok = {"rank": rank, "node": f"n{rank}", "device": "CPU", "free_gib": 1.0, "index": "3 samples"}
    times = {
        "started": 100.0 if rank == 0 else 0.0,
        "seen": 100.1,
        "sent": 100.2,
        "received": 100.3,
    }
    return {**ok, **times, "problems": [], "notes": [], "wrong": "", **changes}


@pytest.mark.parametrize(
    ("changes", "world_size", "status", "expected"),
    [
        ({}, 2, 0, []),
        ({"problems": ["GPU: lost"]}, 2, BAD_NODE, ["node n1: GPU: lost"]),
        ({"wrong": "no shard"}, 2, BAD_NODE, ["node n1: no shard"]),
        ({}, 3, BAD_NODE, ["node of rank 2: rank 2 gave no report (nodes)"]),
    ],
)
def test_the_verdict_on_reports(
    changes: dict[str, object],
    world_size: int,
    status: int,
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("JOB_NODES", raising=False)
    answers = {0: report(0), 1: report(1, **changes)}
    assert judge("nodes", answers, world_size) == (status, expected)
    if "wrong" in changes:  # the same everywhere: the setting is to blame
        everywhere = {0: report(0, **changes), 1: report(1, **changes)}
        assert judge("nodes", everywhere, 2) == (exit_codes.BAD_INPUT, ["no shard"])


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({}, ""),
        ({"seen": 109.0, "sent": 109.1, "received": 109.2}, ""),  # late, but right
        ({"seen": 109.0, "sent": 109.1, "received": 104.0}, "5.1 s ahead of n0's"),
        ({"seen": 90.0, "sent": 90.1, "received": 101.0}, "10.0 s behind n0's"),
    ],
)
def test_a_late_message_is_not_a_wrong_clock(times: dict[str, float], expected: str) -> None:
    found = clock_problem(report(1, **times), report(0))
    assert found == (f"node n1: its clock is {expected}" if expected else "")


def test_a_silent_node_is_named_on_nodes_with_unequal_tasks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("JOB_NODES", "n1 n1 n2")
    assert [node_of(rank) for rank in range(4)] == ["n1", "n1", "n2", "of rank 3"]
