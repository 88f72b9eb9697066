"""The ranks of an evaluation: independent processes that share out samples and meet at its ends."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed

from data_pipeline.errors import InputError
from training.distributed import local_device, rank_from_slurm

T = TypeVar("T")


@dataclass(frozen=True)
class EvaluationGroup:
    """Rank `rank` of `size`, and its device."""

    rank: int
    size: int
    device: torch.device
    joined: bool = False  # whether `join_group` made the process group, and `leave` ends it

    def leave(self) -> None:
        """End the process group."""
        if self.joined:
            torch.distributed.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def from_main(self, compute: Callable[[], T]) -> T:
        """What `compute()` gives on rank 0, on every rank; all of them raise its `InputError`."""
        box: list[Any] = [None]
        if self.is_main:
            try:
                box = [compute()]
            except InputError as error:
                box = [error]
        if self.size > 1:
            torch.distributed.broadcast_object_list(box, src=0)
        if isinstance(box[0], InputError):
            raise box[0]
        return box[0]

    def gather(self, value: T) -> list[T]:
        """The value of every rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values


def join_group(timeout_s: float = 24 * 3600.0) -> EvaluationGroup:
    """Join the ranks that torchrun or srun started; one process alone is a group of one.

    They only meet before and after the samples, so that the timeout is that of the whole work.

    Raises:
        InputError: the environment is incomplete, or there are fewer GPUs than local ranks.
    """
    rank_from_slurm()
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = local_device(int(os.environ.get("LOCAL_RANK", 0)))
    joining = size > 1 and not torch.distributed.is_initialized()
    if joining:
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise InputError(
                f"{size} ranks but {' and '.join(missing)} not set; start with torchrun or "
                "slurm/evaluate.sh"
            )
        torch.distributed.init_process_group(
            "gloo", rank=rank, world_size=size, timeout=timedelta(seconds=timeout_s)
        )
    return EvaluationGroup(rank, size, device, joining)
