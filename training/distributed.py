"""Ranks and devices: torchrun, the deepspeed launcher, direct srun tasks, or one process."""

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed

from data_pipeline.errors import InputError

T = TypeVar("T")


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


def launched_ranks() -> Ranks:
    """This process's place as the environment describes it, which is made complete.

    torchrun and the deepspeed launcher set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
    MASTER_PORT; under srun the first three come from SLURM_PROCID, SLURM_NTASKS and
    SLURM_LOCALID. With neither, the run has one rank.

    Raises:
        InputError: if the environment is incomplete or there are fewer GPUs than local ranks.
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
    device = local_device(local_rank)
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


def local_device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
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
