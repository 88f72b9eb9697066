"""The engine without its data: for estimates, in a process group whose other ranks do not exist."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from transformers import PreTrainedModel

from training.config import RunConfig

OFFLOAD_OPTIMIZER = "deepspeed.offload_optimizer=cpu"
"""The setting that moves masters, gradients and the optimizer's state to the host."""


def join_fake_group(world_size: int) -> None:
    """Be rank 0 of a group in which every collective returns at once, having done nothing.

    RuntimeError if this process is in a group already.
    """
    import deepspeed
    import deepspeed.ops
    from deepspeed.runtime.zero import partitioned_param_coordinator
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if torch.distributed.is_initialized():
        raise RuntimeError("an estimate needs a process of its own: this one is in a group")
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size)}
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # see process_group.py
    torch.distributed.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    # Nobody answers what the others' order of modules is.
    partitioned_param_coordinator.assert_ints_same_as_other_ranks = lambda ints: None


@contextmanager
def without_values() -> Iterator[None]:
    """Models that are built inside get no initial values, whose drawing takes longest."""
    before = PreTrainedModel.initialize_weights
    PreTrainedModel.initialize_weights = lambda *args, **options: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        PreTrainedModel.initialize_weights = before  # type: ignore[method-assign]


def offloaded(config: RunConfig) -> tuple[bool, bool]:
    """Whether the optimizer, and whether the weights, are kept on the host."""
    settings = config.deepspeed
    return settings.offload_optimizer != "none", settings.offload_params != "none"


def resident_tensors(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """(kind, tensor) of all that a `Zero3Engine` holds between steps.

    Kinds: parameters, masters, gradients, optimizer, bucket (in which gradients are sent).
    """
    optimizer = engine.deepspeed.optimizer
    for parameter in engine.module.parameters():
        yield "parameters", parameter.ds_tensor
    for flat in optimizer.fp16_partitioned_groups_flat:
        if flat is not None:
            yield "parameters", flat
    for flat in optimizer.fp32_partitioned_groups_flat:
        yield "masters", flat
    yield "gradients", optimizer.grad_partitions_flat_buffer
    for state in optimizer.optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                yield "optimizer", value
    for bucket in optimizer.ipg_buckets.values():
        if bucket.buffer is not None:
            yield "bucket", bucket.buffer


def around_gathers(engine: Any, around: Callable[[], AbstractContextManager[None]]) -> None:
    """Let a context of its own be around every fetch of whole parameters of a `Zero3Engine`."""
    coordinator = engine.deepspeed.optimizer.parameter_offload.get_param_coordinator()
    fetch = coordinator.fetch_sub_module

    def fetch_within(*args: Any, **options: Any) -> None:
        with around():
            fetch(*args, **options)

    coordinator.fetch_sub_module = fetch_within
