"""The ranks of an evaluation: independent processes that share out samples and meet at its ends."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed

from data_pipeline.errors import InputError
from training.distributed import Ranks, local_device, rank_from_slurm


@contextmanager
def evaluation_ranks(timeout_s: float = 24 * 3600.0) -> Iterator[Ranks]:
    """Join the ranks that torchrun or srun started, and leave them; one process alone is one rank.

    They only meet before and after the samples, so that the timeout is that of the whole work.

    Raises:
        InputError: the environment is incomplete, or there are fewer GPUs than local ranks.
    """
    rank_from_slurm()
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = local_device(local_rank)
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
    yield Ranks(rank, size, local_rank, device)
    if joining:  # not after an error: others may still be in a collective
        torch.distributed.destroy_process_group()
