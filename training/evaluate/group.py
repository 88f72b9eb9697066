"""The ranks of an evaluation: independent processes that share out samples and meet at its ends."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed

from training.distributed import Ranks, claim_device, local_device, rank_from_environment


@contextmanager
def evaluation_ranks(timeout_s: float = 24 * 3600.0) -> Iterator[Ranks]:
    """Join the ranks that torchrun or srun started, and leave them; one process alone is one rank.

    They only meet before and after the samples, so that the timeout is that of the whole work.

    Raises:
        InputError: the environment is incomplete, or there are fewer GPUs than local ranks.
    """
    rank, size, local_rank = rank_from_environment()
    ranks = Ranks(rank, size, local_rank, local_device(local_rank))
    joining = size > 1 and not torch.distributed.is_initialized()
    if joining:
        torch.distributed.init_process_group(
            "gloo", rank=rank, world_size=size, timeout=timedelta(seconds=timeout_s)
        )
        claim_device(ranks)
    yield ranks
    if joining:  # not after an error: others may still be in a collective
        torch.distributed.destroy_process_group()
