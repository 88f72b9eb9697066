"""Ranks and devices: torchrun, the deepspeed launcher, direct srun tasks, or one process."""

import os
import re
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed

from data_pipeline.errors import InputError

T = TypeVar("T")
DEVICES = Path("/dev")
LAUNCHERS = "start with torchrun, the deepspeed launcher, or a script of slurm/"

# Step ids from here on are a batch script and the shell of salloc, not tasks that srun started.
FIRST_SPECIAL_STEP = 4294967290
MISSING_AFTER_S, MISSING_EVERY_S = 10.0, 60.0
"""When a rank says whom it waits for, and how often."""


@dataclass(frozen=True)
class Ranks:
    """Where this process stands: `rank` of `world_size`, and its device."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def launched_ranks(on_cpu: bool = False) -> Ranks:
    """This process's place as the environment describes it, which is made complete.

    on_cpu: whether the CPU is asked for; see `local_device`.

    Raises:
        InputError: see `rank_from_environment` and `local_device`.
    """
    rank, world_size, local_rank = rank_from_environment()
    if world_size == 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        # Whatever a shell has exported for other runs: there is nobody to meet.
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    device = local_device(local_rank, on_cpu)
    local_rank = device.index if device.type == "cuda" else local_rank
    for name, value in (("RANK", rank), ("WORLD_SIZE", world_size), ("LOCAL_RANK", local_rank)):
        os.environ[name] = str(value)  # where libraries look for them
    return Ranks(rank, world_size, local_rank, device)


def rank_from_environment() -> tuple[int, int, int]:
    """The rank, the number of ranks, and the rank on this node.

    torchrun and the deepspeed launcher set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
    MASTER_PORT; under srun the first three come from SLURM_PROCID, SLURM_NTASKS and
    SLURM_LOCALID. With neither, the run has one rank.

    Raises:
        InputError: the environment contradicts itself, is incomplete, or is that of mpirun.
    """
    env = os.environ
    in_batch_script = not _srun_task() and _number("SLURM_NTASKS", 1) > 1
    if "RANK" not in env and env.keys() >= {"SLURM_PROCID", "SLURM_NTASKS"} and not in_batch_script:
        env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_NTASKS"]
        env["LOCAL_RANK"] = env.get("SLURM_LOCALID", "0")
    world_size = _number("WORLD_SIZE", 1)
    mpi = [name for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE") if _number(name, 1) > 1]
    wrong = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in env and world_size > 1]
    wrong += ["RANK"] if world_size > 1 and "RANK" not in env else []
    problem = f"{world_size} ranks but {' and '.join(wrong)} not set"
    if mpi and "RANK" not in env:
        wrong, problem = mpi, f"{mpi[0]} is {env[mpi[0]]}: mpirun does not say who the ranks are"
    elif not 0 <= _number("RANK", 0) < world_size:
        wrong, problem = ["RANK"], f"RANK is {env['RANK']}, but WORLD_SIZE {world_size}"
    if wrong:
        raise InputError(f"{problem}; {LAUNCHERS}")
    if world_size > 1:
        _number("MASTER_PORT", 0)
    return _number("RANK", 0), world_size, _number("LOCAL_RANK", 0)


def _number(name: str, default: int) -> int:
    """A variable of the environment that is a number; InputError if it is none."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise InputError(f"{name} is {text!r}, expected a number; {LAUNCHERS}")
    return int(text)


def _srun_task() -> bool:
    """Whether srun started this process, or a launcher that started it."""
    return _number("SLURM_STEP_ID", FIRST_SPECIAL_STEP) < FIRST_SPECIAL_STEP


def _tasks_on_node() -> int:
    """Of this process's step; Slurm writes 2, 2, 1 as "2(x2),1"."""
    shares = [
        int(share)
        for share, nodes in re.findall(
            r"(\d+)(?:\(x(\d+)\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")
        )
        for _ in range(int(nodes or 1))
    ]
    node = int(os.environ.get("SLURM_NODEID", 0))
    return shares[node] if node < len(shares) else 1


def local_device(local_rank: int, on_cpu: bool = False) -> torch.device:
    """The device of a rank: its GPU, or the CPU of a machine without any.

    on_cpu: the CPU is asked for.

    Raises:
        InputError: if there are GPUs, and the CPU would be used without being asked for, or cannot
            be used; if there are fewer GPUs than local ranks.
    """
    if on_cpu and torch.cuda.is_available():
        raise InputError(
            "train.device is cpu, but PyTorch sees GPUs and the engine would take them; hide them: "
            "set CUDA_VISIBLE_DEVICES to an empty text before the command"
        )
    if not torch.cuda.is_available():
        if not on_cpu and (found := unseen_gpus()):
            raise InputError(
                f"{found}; find out why with `nvidia-smi` and `python -c 'import torch; "
                "torch.zeros(1).cuda()'`, or ask for the CPU: train.device=cpu in training, else "
                "an empty CUDA_VISIBLE_DEVICES"
            )
        return torch.device("cpu")
    count = torch.cuda.device_count()
    # Slurm may show each task its own GPU only; with more tasks than GPUs it is the same one.
    # torchrun's, the deepspeed launcher's
    launcher = os.environ.keys() & {"LOCAL_WORLD_SIZE", "LOCAL_SIZE"}
    own = count == 1 and _srun_task() and not launcher
    if own and _tasks_on_node() <= int(os.environ.get("SLURM_GPUS_ON_NODE", 1)):
        local_rank = 0
    if local_rank >= count:
        raise InputError(
            f"local rank {local_rank} has no GPU: {count} visible; start at most one rank per GPU"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def claim_device(ranks: Ranks) -> None:
    """Make sure that this rank's GPU is no other rank's (needs the process group).

    Raises:
        InputError: another rank has it.
    """
    if ranks.device.type != "cuda":
        return
    gpu = torch.cuda.get_device_properties(ranks.device)
    if "MIG" in gpu.name:  # slices may have the name of the whole
        return
    # Not a collective: NCCL ends with an error of its own, gloo would not notice.
    store = torch.distributed.distributed_c10d._get_default_store()
    if store.add(f"claimed/{gpu.uuid}", 1) > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        raise InputError(
            f"rank {ranks.rank}: {gpu.name} {gpu.uuid} is another rank's, too "
            f"(CUDA_VISIBLE_DEVICES is {visible}); start at most one rank per GPU"
        )


def unseen_gpus() -> str:
    """What says that there are GPUs here, although PyTorch sees none; empty if nothing does.

    In a job that is Slurm's word: a node may have GPUs that the job was not given.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if torch.cuda.is_available() or visible in ("", "-1", "NoDevFiles"):  # there, or hidden
        return ""
    listed = os.environ.get("SLURM_STEP_GPUS") or os.environ.get("SLURM_JOB_GPUS")
    given = os.environ.get("SLURM_GPUS_ON_NODE") or (listed and len(listed.split(","))) or "0"
    there = sorted(str(path) for path in DEVICES.glob("nvidia[0-9]*"))
    if given != "0":
        reason = f"Slurm gave the job {given} GPUs here"
    elif visible and "CROSS_SIZE" not in os.environ:  # else a launcher's, of ranks
        reason = f"CUDA_VISIBLE_DEVICES is {visible}"
    elif there and "SLURM_JOB_ID" not in os.environ:
        reason = f"there are GPUs ({', '.join(there)})"
    else:
        return ""
    return (
        f"node {socket.gethostname()}: {reason}, but PyTorch sees none (driver? CUDA build of "
        "PyTorch? a container without --nv?)"
    )


class StoppedError(Exception):
    """Asked to stop before there was anything to save."""


def wait_for_all(
    ranks: Ranks, timeout_s: float, stop: Callable[[], bool] = lambda: False
) -> torch.distributed.Store:
    """Wait until every rank has come, and say who has not; `init_process_group` then is quick.

    Returns:
        The store they meet at, which rank 0 or its launcher holds: keep it until the group exists.

    Raises:
        StoppedError: if `stop()` became true.
        TimeoutError: naming who has not come within `timeout_s`.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = ranks.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    began, quiet = time.monotonic(), MISSING_AFTER_S

    def pause(absent: Callable[[], list[int]]) -> None:
        nonlocal quiet
        waited = time.monotonic() - began
        if stop():
            raise StoppedError(f"asked to stop while waiting for {_names(absent(), ranks)}")
        if waited > timeout_s:
            text = f"{_names(absent(), ranks)} has not come to {host}:{port}"
            raise TimeoutError(f"{text} within {timeout_s:.0f} s (faults.startup_timeout_s)")
        if waited > quiet:
            quiet = waited + MISSING_EVERY_S
            missing = absent()
            if missing and set(range(ranks.rank)) <= {*missing}:  # one of those that wait speaks
                text = (
                    f"waiting at {host}:{port} for {_names(missing, ranks)}, {waited:.0f} s so far"
                )
                print(text, file=sys.stderr, flush=True)
        time.sleep(min(1.0, 0.05 + waited / 20))

    while not serves and not _answers(host, port):
        pause(lambda: [0])
    wait = timedelta(seconds=timeout_s)
    store = torch.distributed.TCPStore(
        host, port, None, serves, wait, wait_for_workers=False, multi_tenant=serves
    )
    store.set(f"here/{ranks.rank}", "")
    store.add("here", 1)
    while store.add("here", 0) < ranks.world_size:
        pause(lambda: [r for r in range(ranks.world_size) if not store.check([f"here/{r}"])])
    return store


def _names(absent: list[int], ranks: Ranks) -> str:
    names = ", ".join(map(str, absent[:20])) + ", ..." * (len(absent) > 20)
    return f"rank {names} of {ranks.world_size} (this is rank {ranks.rank})"


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def from_main(compute: Callable[[], T]) -> T:
    """What `compute()` gives on rank 0, on every rank; all of them raise its `InputError`."""
    box: list[Any] = [None]
    alone = not torch.distributed.is_initialized()
    if alone or torch.distributed.get_rank() == 0:
        try:
            box = [compute()]
        except InputError as error:
            box = [error]
    if not alone:
        torch.distributed.broadcast_object_list(box, src=0)
    if isinstance(box[0], InputError):
        raise box[0]
    return box[0]


def gather(value: T) -> list[T]:
    """The value of every rank, on every rank; without a process group there is one."""
    if not torch.distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def all_reduce_sum(values: list[float], device: torch.device) -> list[float]:
    """Sum each value over all ranks, in float64 (one collective)."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(tensor)
    return tensor.tolist()


def all_reduce_max(values: list[float], device: torch.device) -> list[float]:
    """Largest of each value over all ranks (one collective)."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
    return tensor.tolist()
