"""The test cluster itself: runs jobs on both nodes, shows what failed, leaves nothing behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.slurm import cluster as cluster_module
from tests.slurm.cluster import NODES, ROOT, Cluster, ClusterError
from tests.slurm.conftest import no_cluster

pytestmark = pytest.mark.slurm


def script(folder: Path, body: str) -> Path:
    path = folder / "job.sh"
    path.write_text(f"#!/bin/bash\n{body}\n")
    return path


def test_a_job_runs_on_both_nodes(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit(script(tmp_path, "srun printenv SLURMD_NODENAME; echo args: $1"), "one")
    lines = cluster.wait(job).log.splitlines()
    assert sorted(lines) == sorted([*NODES, "args: one"])


def test_an_unexpected_end_shows_the_logs(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit(script(tmp_path, "echo why it failed; exit 3"))
    with pytest.raises(ClusterError, match="FAILED, expected COMPLETED") as error:
        cluster.wait(job)
    assert "why it failed" in str(error.value)
    assert "slurmctld.log" in str(error.value)
    assert all(f"slurmd-{node}.log" in str(error.value) for node in NODES)
    assert cluster.wait(job, state="FAILED").exit_code == 3


def test_a_job_that_takes_too_long_is_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit(script(tmp_path, "echo started; sleep 600"))
    cluster.wait_for(job, "started")
    with pytest.raises(ClusterError, match="still RUNNING"):
        cluster.wait(job, timeout=0)
    cluster.wait(job, timeout=20, state="CANCELLED")


def test_stop_ends_even_a_job_that_ignores_signals(
    cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("stop")  # `cluster` runs beside it: they must not meet
    with Cluster(folder) as other:
        job = other.submit(script(folder, "srun bash -c 'trap \"\" TERM; echo up; sleep 600'"))
        other.wait_for(job, "up")
        assert other.processes()
        started = time.monotonic()
    assert not other.processes()
    assert time.monotonic() - started < 30
    cluster.run("sinfo")


def test_the_daemons_end_with_a_killed_test_run(
    cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from tests.slurm.cluster import Cluster\n"
        "Cluster(Path(sys.argv[1])).__enter__(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    folder = tmp_path_factory.mktemp("killed")
    run = subprocess.run([sys.executable, "-c", code, folder], cwd=ROOT)
    assert run.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while Cluster(folder).processes() and time.monotonic() < deadline:
        time.sleep(0.1)
    left = Cluster(folder).processes()
    Cluster(folder).stop()
    assert not left


def test_a_failed_start_says_why_and_leaves_nothing(
    cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = cluster_module.SLURM_CONF.replace("KillWait=5", "KillWait=soon")
    monkeypatch.setattr(cluster_module, "SLURM_CONF", broken)
    other = Cluster(tmp_path_factory.mktemp("broken"))
    with pytest.raises(ClusterError, match="KillWait"):
        other.__enter__()
    assert not other.processes()


def test_a_folder_too_deep_for_sockets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="TMPDIR"):
        Cluster(tmp_path / ("deep" * 20)).__enter__()


def test_without_a_cluster_tests_are_skipped_unless_required(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("REQUIRE_SLURM", "1")
    with pytest.raises(pytest.fail.Exception, match="no root"):
        no_cluster("no root")
    monkeypatch.delenv("REQUIRE_SLURM")
    with pytest.raises(pytest.skip.Exception, match="no root"):
        no_cluster("no root")


def test_missing_programs_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(cluster_module.shutil, "which", lambda name, path: None)
    reason = cluster_module.missing_requirement()
    assert reason is not None
    assert "slurmctld" in reason and "install.sh" in reason
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "root" in (cluster_module.missing_requirement() or "")
