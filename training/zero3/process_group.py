"""Join the process group through DeepSpeed, quietly."""

import logging
import warnings
from collections.abc import Callable
from datetime import timedelta

from training.distributed import Ranks, claim_device, launched_ranks, wait_for_all


def init_distributed(
    timeout_s: float = 1800.0, on_cpu: bool = False, stop: Callable[[], bool] = lambda: False
) -> Ranks:
    """Join the process group described by the environment; see `launched_ranks`, `wait_for_all`.

    Args:
        timeout_s: longest wait for the others, there and in the collectives that follow.
        on_cpu: whether the CPU is asked for.
        stop: whether to give up waiting.
    """
    ranks = launched_ranks(on_cpu)
    store = wait_for_all(ranks, timeout_s, stop)

    import deepspeed
    import deepspeed.ops

    if ranks.device.type == "cpu":
        # The shared-memory all-reduce is compiled at start-up, needs a C++ compiler, and ZeRO-3
        # (all-gather, reduce-scatter) does not use it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if ranks.device.type == "cuda" else "gloo",
        timeout=timedelta(seconds=timeout_s),
        auto_mpi_discovery=False,
        verbose=False,
    )
    del store
    claim_device(ranks)
    return ranks


def quiet_libraries() -> None:
    """Hide start-up chatter of the libraries, not their errors."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*(all_gather_into_tensor|reduce_scatter).*")
