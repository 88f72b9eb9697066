"""The stages' scripts and their chain, dry runs, and containers, on a real cluster."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import NODES, ROOT, Cluster

pytestmark = pytest.mark.slurm
DIGITS = "training/configs/digits.yaml"
STAGES = {
    "align": "stage1_align",
    "pretrain": "stage2_pretrain",
    "finetune": "stage3_finetune",
}
# Fails where the arguments say so.
PRINT_STAGE = """\
#!/bin/bash
printf '<%s>' "$@"; echo
[[ "$*" != *fail=1* ]] || exit 2
"""


def program(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)
    return path


def outside_a_job(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))}
    return subprocess.run(
        command, cwd=ROOT, env={**env, **variables}, capture_output=True, text=True
    )


def test_a_dry_run_outside_a_job_submits_nothing() -> None:
    command = ["slurm/pretrain.sh", "--dry-run", "--nodes=2", DIGITS, "train.steps=7", "seed=1"]
    run = outside_a_job(*command, SBATCH_PARTITION="gpu", PYTHON=sys.executable)
    assert run.returncode == 0, run.stderr
    out = run.stdout
    assert f"sbatch --nodes=2 slurm/pretrain.sh {DIGITS} train.steps=7 seed=1\n" in out
    assert "--signal=B:USR1@120\n" in out and "SBATCH_PARTITION=gpu\n" in out
    assert f"--label {sys.executable} -m training.train {DIGITS} train.steps=7 seed=1\n" in out
    assert re.search(r"^  steps: 7$", out, re.M) and re.search(r"^seed: 1$", out, re.M)


def test_a_dry_run_finds_what_would_fail() -> None:
    run = outside_a_job("slurm/align.sh", "--dry-run", "train.stepz=7", PYTHON=sys.executable)
    assert run.returncode == 2 and "train.stepz: unknown key" in run.stderr
    run = outside_a_job("slurm/align.sh", "--dry-run", "no.yaml")
    assert run.returncode == 2 and run.stderr.startswith("error: no configuration at no.yaml")


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        (["--nodes", "2"], "write --nodes 2 as --nodes=2"),
        (["--export", "ALL,A=b"], "write --export ALL,A=b as --export=ALL,A=b"),
        (["-p", "gpu"], "write -p gpu as -pgpu"),
        (["-p=gpu"], 'sbatch reads -p=gpu as the value "=gpu": write -pgpu'),
    ],
)
def test_an_option_of_sbatch_is_one_word(options: list[str], advice: str) -> None:
    for command in (["slurm/align.sh", "--dry-run"], ["slurm/chain.sh", "--dry-run"]):
        run = outside_a_job(*command, *options)
        assert run.returncode == 2 and run.stderr == f"error: {advice}\n"


def test_options_without_a_value_stand_before_the_config() -> None:
    options = ["-pgpu", "--exclusive", "-H"]
    command = ["slurm/align.sh", "--dry-run", *options, DIGITS]
    run = outside_a_job(*command, PYTHON=sys.executable)
    assert run.stdout.startswith(f"sbatch -pgpu --exclusive -H slurm/align.sh {DIGITS}\n")


def test_a_dry_run_in_a_job_runs_nothing(cluster: Cluster, tmp_path: Path) -> None:
    python = program(tmp_path, "python", PRINT_STAGE)
    env = {"PYTHON": str(python)}
    job = cluster.submit("slurm/finetune.sh", "--dry-run", "a=b", nodes=2, env=env)
    log = cluster.wait(job).log
    config = "training/configs/stage3_finetune.yaml"
    assert "srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=1" in log
    assert f"{python} -m training.train {config} a=b\n" in log
    assert f"<-m><training.preflight><--settings><{config}><a=b>\n" in log
    assert "0: " not in log  # no task


def chain(
    cluster: Cluster, folder: Path, *arguments: str
) -> tuple[dict[str, int], subprocess.CompletedProcess[str]]:
    """Run slurm/chain.sh with one node per stage; its logs go to `folder`."""
    env = {**cluster.env, "PYTHON": str(program(folder, "python", PRINT_STAGE))}
    command = ["slurm/chain.sh", "--nodes=1", f"--output={folder}/%x.out", *arguments]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    return {k: int(v) for k, v in re.findall(r"^(\w+): job (\d+)", run.stdout, re.M)}, run


def test_the_chain_runs_the_stages_in_order(cluster: Cluster, tmp_path: Path) -> None:
    jobs, run = chain(
        cluster, tmp_path, "--out", f"{tmp_path}/runs", "align:train.steps=3", "seed=4"
    )
    assert list(jobs) == list(STAGES), run.stderr
    assert f"pretrain: job {jobs['pretrain']}, after align" in run.stdout
    ends = []
    for stage, job in jobs.items():
        info = cluster.job(job)
        cluster.wait(job)
        ends.append((cluster.job(job)["StartTime"], cluster.job(job)["EndTime"]))
        assert info["Requeue"] == "1" and info["JobName"] == stage
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))
    out = f"{tmp_path}/runs"
    expected = {
        "align": f"<output_dir={out}/align><train.steps=3><seed=4>",
        "pretrain": f"<output_dir={out}/pretrain><checkpoint.init_from={out}/align/checkpoints>",
        "finetune": f"<output_dir={out}/finetune><checkpoint.init_from={out}/pretrain/checkpoints>",
    }
    for stage, config in STAGES.items():
        log = (tmp_path / f"{stage}.out").read_text()
        assert f"0: <-m><training.train><training/configs/{config}.yaml>{expected[stage]}" in log
    assert "train.steps=3" not in (tmp_path / "pretrain.out").read_text()


def test_a_failed_stage_takes_the_later_ones_out_of_the_queue(
    cluster: Cluster, tmp_path: Path
) -> None:
    jobs, _ = chain(cluster, tmp_path, "pretrain:fail=1")
    cluster.wait(jobs["align"])
    cluster.wait(jobs["pretrain"], state="FAILED")
    cluster.wait(jobs["finetune"], state="CANCELLED")
    assert not (tmp_path / "finetune.out").exists()


def test_the_chain_submits_all_stages_or_none(cluster: Cluster, tmp_path: Path) -> None:
    fails_second = (
        f"#!/bin/bash\n[[ $* != *pretrain.sh* ]] || {{ echo no >&2; exit 1; }}\n"
        f'exec {cluster.run("which", "sbatch").strip()} --hold "$@"\n'
    )
    program(tmp_path, "sbatch", fails_second)
    env = {**cluster.env, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    run = subprocess.run(["slurm/chain.sh"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 2
    assert "error: sbatch refused pretrain" in run.stderr
    job = int(re.findall(r"align: job (\d+)", run.stdout)[0])
    assert cluster.job(job)["JobState"] == "CANCELLED"


def test_the_chain_dry_run_prints_the_commands() -> None:
    run = outside_a_job("slurm/chain.sh", "--dry-run", "--nodes=2", "finetune:seed=9")
    assert run.returncode == 0, run.stderr
    first, second, third = run.stdout.splitlines()
    assert first == "sbatch --parsable --nodes=2 slurm/align.sh training/configs/stage1_align.yaml"
    assert "--dependency=afterok:JOB_OF_ALIGN --kill-on-invalid-dep=yes" in second
    assert third.endswith("slurm/finetune.sh training/configs/stage3_finetune.yaml seed=9")
    run = outside_a_job("slurm/chain.sh", "nonsense")
    assert run.returncode == 2 and run.stderr.startswith("error: expected key=value")
    # Not silently a setting of all stages; a colon in a value is the value's.
    run = outside_a_job("slurm/chain.sh", "--dry-run", "aling:seed=9")
    assert run.returncode == 2 and 'no stage "aling" in aling:seed=9' in run.stderr
    url = "data.shards=[s3://b:80/{0..3}.tar?a=b]"
    run = outside_a_job("slurm/chain.sh", "--dry-run", "--dependency=afterok:7", url)
    first, second, third = run.stdout.splitlines()
    assert first.count("--dependency=") == 1 and all(
        "s3://b:80" in c for c in (first, second, third)
    )
    # sbatch heeds the last one.
    assert re.findall(r"--dependency=afterok:(\S+)", third) == ["7", "JOB_OF_PRETRAIN"]


# Stands in for apptainer: says how it was called and runs the command outside any container.
APPTAINER = """\
#!/bin/bash
while [[ $1 != image.sif ]]; do args+=("$1"); shift; done
echo "apptainer ${args[*]} in $SLURMD_NODENAME"; shift; exec "$@"
"""


def test_apptainer_runs_every_task(cluster: Cluster, tmp_path: Path) -> None:
    program(tmp_path, "apptainer", APPTAINER)
    env = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "CONTAINER": "image.sif",
        "CONTAINER_MOUNTS": "/data:/data",
        "PYTHON": str(program(tmp_path, "python", PRINT_STAGE)),
    }
    log = cluster.wait(cluster.submit("slurm/pretrain.sh", env=env)).log
    for rank, node in enumerate(NODES):
        mounts = f"--bind {ROOT}:{ROOT},/data:/data --pwd {ROOT}"
        assert f"{rank}: apptainer exec {mounts} in {node}\n" in log
        assert f"{rank}: <-m><training.train><{DIGITS}>\n" in log


def test_pyxis_is_used_where_srun_has_it(tmp_path: Path) -> None:
    """Only what is handed to srun: pyxis itself is not on the test cluster."""
    program(
        tmp_path, "srun", "#!/bin/bash\necho '      --container-image=[USER@][REGISTRY#]IMAGE'\n"
    )
    run = outside_a_job(
        *("slurm/pretrain.sh", "--dry-run", DIGITS),
        CONTAINER="nvcr.io#nvidia/pytorch",
        PATH=f"{tmp_path}:{os.environ['PATH']}",
        PYTHON=sys.executable,
    )
    mounts = f"--container-mounts={ROOT}:{ROOT} --container-workdir={ROOT}"
    assert f"--container-image=nvcr.io#nvidia/pytorch {mounts} {sys.executable}" in run.stdout


def test_without_a_runtime_a_container_is_refused(tmp_path: Path) -> None:
    run = outside_a_job("slurm/pretrain.sh", "--dry-run", CONTAINER="image.sif")
    assert run.returncode == 2 and "srun has no --container-image (pyxis)" in run.stderr
