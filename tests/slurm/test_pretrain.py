"""slurm/pretrain.sh on a real cluster: tasks and their environment, how jobs end and go on."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import NODES, ROOT, Cluster

pytestmark = pytest.mark.slurm
PRETRAIN = "slurm/pretrain.sh"
DIGITS = "training/configs/digits.yaml"

# Stands in for Python where a test is about the launcher: prints what a task gets.
PRINT_TASK = """\
#!/bin/bash
echo "task $SLURM_PROCID/$SLURM_NTASKS local $SLURM_LOCALID on $SLURMD_NODENAME\
 gpus ${CUDA_VISIBLE_DEVICES:-none} threads $OMP_NUM_THREADS of $SLURM_CPUS_PER_TASK"
printf '<%s>' "$@"; echo
"""
ALL_REDUCE = f"""\
#!{sys.executable}
import os, torch, torch.distributed as dist
rank, world = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
assert "RANK" not in os.environ
dist.init_process_group("gloo", rank=rank, world_size=world)  # at MASTER_ADDR:MASTER_PORT
total = torch.tensor(10.0 ** rank)
dist.all_reduce(total)
print("sum", int(total), flush=True)
dist.destroy_process_group()
os._exit(0)  # as training.exit_codes.run_rank: gloo's threads may abort an orderly end
"""


def program(folder: Path, text: str) -> dict[str, str]:
    """The environment in which pretrain.sh runs this program instead of Python."""
    path = folder / "program"
    path.write_text(text)
    path.chmod(0o755)
    return {"PYTHON": str(path)}


def lines_of_rank(log: str, rank: int) -> list[str]:
    return [line.split(": ", 1)[1] for line in log.splitlines() if line.startswith(f"{rank}: ")]


ARBITRARY = ("--distribution=arbitrary", f"--nodelist={','.join(NODES)}")
SCRIPTS = [*sorted(ROOT.glob("slurm/*.sh")), *sorted(ROOT.glob("tests/**/*.sh"))]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_shell_scripts_are_clean(script: Path) -> None:
    subprocess.run(["bash", "-n", script], cwd=ROOT, check=True)
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    subprocess.run(["shellcheck", "--external-sources", script], cwd=ROOT, check=True)


@pytest.mark.parametrize("name", ["align", "pretrain", "finetune", "preflight"])
def test_outside_a_job_it_says_how_to_submit(name: str) -> None:
    env = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    script = ROOT / f"slurm/{name}.sh"
    run = subprocess.run([script], env=env, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2
    assert re.fullmatch("error: not in a Slurm job.*sbatch.*--help.*\n", run.stderr)
    asked = subprocess.run([script, "--help"], env=env, capture_output=True, text=True)
    assert asked.returncode == 0
    assert f"slurm/{name}.sh [CONFIG.yaml] [key=value ...]" in asked.stdout and not asked.stderr


def test_a_fresh_clone_runs_with_the_bare_command(cluster: Cluster, tmp_path: Path) -> None:
    """`sbatch slurm/pretrain.sh`: the default config, the clone's .venv, the log beside it."""
    clone = tmp_path / "my clone"
    shutil.copytree(ROOT / "slurm", clone / "slurm")
    shutil.copytree(ROOT / "training/configs", clone / "training/configs")
    (clone / ".venv/bin").mkdir(parents=True)
    python = program(tmp_path, PRINT_TASK)["PYTHON"]
    (clone / ".venv/bin/python").symlink_to(python)
    job = int(cluster.run("sbatch", "--parsable", PRETRAIN, cwd=clone))
    cluster.wait(job)
    log = (clone / f"pretrain-{job}.out").read_text()
    assert f"task 0/1 local 0 on {NODES[0]} gpus none threads 1 of 1" in log
    assert f"<-m><training.train><{DIGITS}>" in log
    assert re.search(rf"rendezvous {NODES[0]}:2\d{{4}}\n", log)


@pytest.mark.parametrize(
    ("options", "env", "tasks", "gpus", "cpus"),
    [
        (["--gpus-per-node=2", "--cpus-per-gpu=1"], {}, (2, 2), 2, 1),
        (["--gres=gpu:2", "--exclusive"], {}, (2, 2), 2, 1),
        (["--ntasks-per-node=2", "--gpus-per-task=1"], {}, (2, 2), 2, 1),
        (["--gpus=4", "--ntasks-per-gpu=1"], {}, (2, 2), 2, 1),
        (["--gres=gpu:2", "--cpus-per-task=2", *ARBITRARY], {}, (2, 2), 2, 1),
        (["--gres=gpu:1"], {"TASKS_PER_NODE": "2"}, (1, 1), 1, 1),
        (["--ntasks=3", "--gpus-per-task=1"], {}, (2, 1), 2, 1),  # one GPU on the second node
        (["--ntasks=2", "--gpus-per-task=2", "--cpus-per-task=2"], {}, (2, 2), 2, 1),
        (["--gpus=3", "--exclusive"], {}, (2, 2), 2, 1),  # whole nodes
        (["--gpus-per-node=1", "--exclusive"], {}, (2, 2), 2, 1),
        (["--gpus-per-node=2", "--overcommit"], {}, (2, 2), 2, 1),
        (["--cpus-per-task=2"], {"TASKS_PER_NODE": "2"}, (2, 2), 0, 1),
        (["--cpus-per-task=2"], {}, (1, 1), 0, 2),
        (["--ntasks-per-node=2"], {}, (2, 2), 0, 1),
        (["--ntasks=3"], {}, (2, 1), 0, 1),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_one_task_per_gpu(
    cluster: Cluster,
    tmp_path: Path,
    options: list[str],
    env: dict[str, str],
    tasks: tuple[int, int],
    gpus: int,
    cpus: int,
) -> None:
    """However the GPUs were asked for; all tasks of a node see all of its GPUs (`gpus` at most)."""
    env = {**env, **program(tmp_path, PRINT_TASK)}
    log = cluster.wait(cluster.submit(PRETRAIN, options=options, env=env)).log
    places = [(node, local) for node in (0, 1) for local in range(tasks[node])]
    for rank, (node, local) in enumerate(places):
        seen = ",".join(map(str, range(min(gpus, tasks[node])))) or "none"
        assert lines_of_rank(log, rank)[0] == (
            f"task {rank}/{len(places)} local {local} on {NODES[node]} gpus {seen}"
            f" threads {cpus} of {cpus}"
        )
    told = next((int(o.split("=")[1]) for o in options if o.startswith("--ntasks=")), len(places))
    assert (f"not the {told} of sbatch" in log) == (told != len(places))


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], "from_env.yaml"),
        (["train.steps=2"], "from_env.yaml><train.steps=2"),
        (["other.yaml", "key=Two words, $HOME"], "other.yaml><key=Two words, $HOME"),
        (["lr=1/config.yaml", "a=b"], "lr=1/config.yaml><a=b"),
    ],
)
def test_config_and_overrides_reach_the_trainer(
    cluster: Cluster, tmp_path: Path, args: list[str], expected: str
) -> None:
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    (tmp_path / "training").mkdir()
    for name in ("from_env.yaml", "other.yaml", "lr=1/config.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    env = {"CONFIG": "from_env.yaml", **program(tmp_path, PRINT_TASK)}
    job = cluster.submit(PRETRAIN, *args, nodes=1, env=env, cwd=tmp_path)
    assert lines_of_rank(cluster.wait(job).log, 0)[1] == f"<-m><training.train><{expected}>"


def test_the_environment_of_the_tasks(cluster: Cluster, tmp_path: Path) -> None:
    """Site settings arrive, even with --export=NONE; what another launcher left behind does not."""
    site = tmp_path / "site.sh"
    site.write_text('export NCCL_SOCKET_IFNAME=ib7\n[[ -z "$NEVER_SET" ]]\n')
    names = "NCCL_SOCKET_IFNAME MASTER_ADDR MASTER_PORT RANK WORLD_SIZE LOCAL_RANK"
    printing = f"#!/bin/bash\nfor name in {names}; do echo $name=${{!name-unset}}; done\n"
    stale = {"RANK": "5", "WORLD_SIZE": "9", "LOCAL_RANK": "5", "MASTER_ADDR": "gone"}
    env = {"SITE": str(site), "MASTER_PORT": "1", **stale, **program(tmp_path, printing)}
    exported = f"--export=SITE,PYTHON,{','.join(stale)},MASTER_PORT"
    job = cluster.submit(PRETRAIN, env=env, options=[exported])
    log = cluster.wait(job).log
    expected = [
        "NCCL_SOCKET_IFNAME=ib7",
        f"MASTER_ADDR={NODES[0]}",
        f"MASTER_PORT={20000 + job % 10000}",
    ]
    expected += ["RANK=unset", "WORLD_SIZE=unset", "LOCAL_RANK=unset"]
    assert lines_of_rank(log, 0) == lines_of_rank(log, 1) == expected


@pytest.mark.parametrize(
    ("args", "options", "env", "message"),
    [
        (["no.yaml"], [], {}, "no configuration at no.yaml"),
        ([], ["--gres=gpu:2"], {}, "1 CPU for 2 tasks on each node"),
        ([], [], {"PYTHON": "no-python"}, "no Python at no-python"),
        ([], [], {"SITE": "no-site.sh"}, "no site settings at no-site.sh"),
    ],
)
def test_what_is_missing_is_named_before_the_start(
    cluster: Cluster, args: list[str], options: list[str], env: dict[str, str], message: str
) -> None:
    job = cluster.wait(
        cluster.submit(PRETRAIN, *args, options=options, env=env), timeout=20, state="FAILED"
    )
    assert f"error: {message}" in job.log
    assert job.exit_code == 2


def test_where_the_repository_is(cluster: Cluster, tmp_path: Path) -> None:
    """Where --chdir says or a shell of salloc finds the script; from elsewhere it is refused."""
    env = program(tmp_path, PRINT_TASK)
    sbatch = ("sbatch", "--parsable", f"--output={tmp_path}/%j.out")
    script = ROOT / PRETRAIN
    there = int(cluster.run(*sbatch, f"--chdir={ROOT}", script, env=env, cwd=tmp_path))
    away = int(cluster.run(*sbatch, f"--chdir={tmp_path}", script, env=env, cwd=ROOT))
    refused = int(cluster.run(*sbatch, script, cwd=tmp_path))
    printed = cluster.run("salloc", "--gpus=3", "--exclusive", script, env=env, cwd=tmp_path)
    assert lines_of_rank(printed, 3)[0].startswith(f"task 3/4 local 1 on {NODES[1]} gpus 0,1")
    for job in (there, away):
        assert "task 0/1" in cluster.wait(job).log
    assert cluster.wait(refused, state="FAILED").exit_code == 2
    assert f"{tmp_path} is not the root of the repository" in cluster.log(refused)


def test_what_would_train_in_part_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    log = tmp_path / "log"
    env = program(tmp_path, PRINT_TASK)
    options = (f"--output={log}", "--nodes=1", ":", "--nodes=1")
    job = int(cluster.run("sbatch", "--parsable", *options, PRETRAIN, env=env))
    srun = ("srun", "--ntasks=2", PRETRAIN)
    inside = subprocess.run(
        srun, cwd=ROOT, env={**cluster.env, **env}, capture_output=True, text=True, timeout=60
    )
    assert inside.returncode == 2 and "error: started by srun" in inside.stderr
    deadline = time.monotonic() + 20
    while not log.exists() or not log.read_text():
        assert time.monotonic() < deadline, cluster.logs()
        time.sleep(0.1)
    assert "error: only the first part of a heterogeneous job" in log.read_text()
    assert " ExitCode=2:0 " in cluster.run("scontrol", "show", "job", "--oneliner", str(job))


def test_ranks_meet_at_the_rendezvous(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit(PRETRAIN, env=program(tmp_path, ALL_REDUCE))
    log = cluster.wait(job, timeout=60).log
    assert lines_of_rank(log, 0) == lines_of_rank(log, 1) == ["sum 11"]


def test_a_dead_rank_ends_the_others(cluster: Cluster, tmp_path: Path) -> None:
    """Also one that ignores SIGTERM, after Slurm's KillWait (5 s here)."""
    dying = "#!/bin/bash\ntrap '' TERM\n((SLURM_PROCID)) || exec sleep 600\necho gone; exit 7\n"
    env = {"MAX_RESTARTS_WITHOUT_PROGRESS": "0", **program(tmp_path, dying)}
    started = time.monotonic()
    ended = cluster.wait(cluster.submit(PRETRAIN, env=env), timeout=30, state="FAILED")
    assert time.monotonic() - started < 5 + 2 + 2
    assert ended.exit_code == 7
    assert "1: gone" in ended.log and "given up" in ended.log


def test_a_requeued_job_runs_again_and_keeps_its_log(cluster: Cluster, tmp_path: Path) -> None:
    waiting = "#!/bin/bash\necho waiting; ((${SLURM_RESTART_COUNT:-0})) || exec sleep 600\n"
    job = cluster.submit(PRETRAIN, env=program(tmp_path, waiting))
    cluster.wait_for(job, "1: waiting")
    cluster.run("scontrol", "requeue", str(job))
    log = cluster.wait(job, timeout=60).log
    assert "(restart 0)" in log and "(restart 1)" in log
    assert len(lines_of_rank(log, 0)) >= 2


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_two_nodes_train_and_a_second_job_goes_on(
    cluster: Cluster, tmp_path: Path, digits_corpus: Path
) -> None:
    def train(steps: int) -> str:
        job = cluster.submit(
            PRETRAIN,
            DIGITS,
            f"output_dir={tmp_path}/run",
            f"train.steps={steps}",
            "train.extend=stretch",
            "train.precision=fp32",
            "checkpoint.every_steps=3",
            "data.prepare=null",
            f"data.shards=[{digits_corpus}/train]",
            f"data.eval_shards=[{digits_corpus}/eval]",
            f"data.tokenizer={digits_corpus}/tokenizer.model",
            "deepspeed.param_persistence_threshold=0",
            env={"PYTHON": sys.executable},
        )
        return cluster.wait(job, timeout=120).log

    log = train(6)
    assert any("world size 2" in line for line in lines_of_rank(log, 0))
    assert not any("world size" in line for line in lines_of_rank(log, 1))
    first = metrics(tmp_path / "run")
    assert [row["step"] for row in first] == [1, 2, 3, 4, 5, 6]

    log = train(9)
    assert "step-00000006 at step 6" in log
    both = metrics(tmp_path / "run")
    assert both[:6] == first  # with their times: not trained again
    assert [row["step"] for row in both[6:]] == [7, 8, 9]
    assert len(list((tmp_path / "run/checkpoints").glob("step-*/manifest.json"))) == 2


def test_a_wrong_setting_fails_the_job_at_once(cluster: Cluster, tmp_path: Path) -> None:
    started = time.monotonic()
    job = cluster.submit(
        PRETRAIN,
        DIGITS,
        f"output_dir={tmp_path}/run",
        "train.stepz=6",
        env={"PYTHON": sys.executable},
    )
    ended = cluster.wait(job, timeout=60, state="FAILED")
    assert time.monotonic() - started < 45
    assert ended.exit_code == 2
    assert re.search(r"train\.stepz: .*steps\?", ended.log)
