"""Ranks and devices: torchrun, the deepspeed launcher, direct srun tasks, or one process."""

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed

from data_pipeline.errors import InputError

T = TypeVar("T")
DEVICES = Path("/dev")


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

    torchrun and the deepspeed launcher set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
    MASTER_PORT; under srun the first three come from SLURM_PROCID, SLURM_NTASKS and
    SLURM_LOCALID. With neither, the run has one rank.

    Raises:
        InputError: if the environment is incomplete, there are fewer GPUs than local ranks, or
            there are GPUs that PyTorch does not see.
    """
    rank_from_slurm()
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if world_size == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise InputError(
            f"{world_size} ranks but {' and '.join(missing)} not set; start with torchrun, the "
            "deepspeed launcher, or slurm/pretrain.sh"
        )
    device = local_device(local_rank, on_cpu)
    local_rank = device.index if device.type == "cuda" else local_rank
    for name, value in (("RANK", rank), ("WORLD_SIZE", world_size), ("LOCAL_RANK", local_rank)):
        os.environ[name] = str(value)  # where libraries look for them
    return Ranks(rank, world_size, local_rank, device)


def rank_from_slurm() -> None:
    """Translate srun's task numbers, unless another launcher has set RANK."""
    if "RANK" in os.environ or "SLURM_PROCID" not in os.environ or "SLURM_NTASKS" not in os.environ:
        return
    if "SLURM_STEP_ID" not in os.environ and int(os.environ["SLURM_NTASKS"]) > 1:
        return  # inside a batch script, not in an srun task
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    os.environ["WORLD_SIZE"] = os.environ["SLURM_NTASKS"]
    os.environ["LOCAL_RANK"] = os.environ.get("SLURM_LOCALID", "0")


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
    # Slurm may show each task its own GPU only.
    index = 0 if torch.cuda.device_count() == 1 and "SLURM_STEP_ID" in os.environ else local_rank
    if index >= torch.cuda.device_count():
        raise InputError(
            f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} visible; start at "
            "most one rank per GPU"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


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
