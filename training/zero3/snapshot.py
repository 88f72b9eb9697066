"""A copy in host memory of what DeepSpeed would save, taken while training waits.

DeepSpeed's own save runs with its checkpoint engine replaced by one that copies the state dicts:
they hold the live tensors, which the next step overwrites.
"""

import copy
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

OVERHEAD_BYTES = 2**17
"""Names, shapes and settings in a shard."""


class HostBuffers:
    """Host tensors kept from one snapshot to the next: new memory costs seven times the copy."""

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        self.used = 0

    def restart(self) -> None:
        """Reuse all buffers; nobody may still need the last snapshot."""
        self.used = 0

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous host copy; of a CUDA tensor, complete once the device has synchronized."""
        if self.used == len(self.tensors):
            self.tensors.append(torch.empty(0))
        kept = self.tensors[self.used]
        if kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            pinned = tensor.is_cuda and tensor.numel() > 0
            kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            self.tensors[self.used] = kept
        self.used += 1
        return kept.copy_(tensor.detach(), non_blocking=True)


def host_copy(value: Any, buffers: HostBuffers) -> Any:
    """The same nested containers with copies of all tensors, and of all that could change."""
    if isinstance(value, torch.Tensor):
        return buffers.copy(value)
    if isinstance(value, OrderedDict):
        result = OrderedDict((key, host_copy(item, buffers)) for key, item in value.items())
        result.__dict__.update(copy.deepcopy(value.__dict__))  # a module's state has _metadata
        return result
    if type(value) is dict:
        return {key: host_copy(item, buffers) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(host_copy(item, buffers) for item in value)
    return copy.deepcopy(value)


class _Collector:
    """Collects copies of what DeepSpeed saves, and touches no file; one of its CheckpointEngines.

    Without that base class, as it would import DeepSpeed before the device is chosen.
    """

    def __init__(self, buffers: HostBuffers) -> None:
        self.buffers = buffers
        self.shards: dict[str, Any] = {}

    def save(self, state_dict: Any, path: str) -> None:
        self.shards[Path(path).name] = host_copy(state_dict, self.buffers)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pass

    def create(self, info: Any) -> None:
        pass

    def commit(self, info: Any) -> bool:
        return True

    def is_decoupled(self) -> bool:
        return False


@contextmanager
def _collecting(engine: Any, collector: _Collector) -> Iterator[None]:
    """DeepSpeed saves into `collector`, and copies no scripts into the checkpoint folder."""
    own = engine.checkpoint_engine
    engine.checkpoint_engine = collector
    engine._copy_recovery_script = lambda path: None
    try:
        yield
    finally:
        engine.checkpoint_engine = own
        del engine._copy_recovery_script


def take_snapshot(
    engine: Any, client_state: dict[str, Any], buffers: HostBuffers
) -> dict[str, Any]:
    """This rank's shards by file name, copied to host memory. Every rank must call this.

    The copies live in `buffers` until the next snapshot.
    """
    buffers.restart()
    collector = _Collector(buffers)
    with _collecting(engine, collector):
        engine.save_checkpoint("none", tag="none", client_state=client_state, save_latest=False)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return collector.shards


def snapshot_bytes(engine: Any, average: bool = False) -> int:
    """About what this rank's shards take: fp32 masters and two moments, frozen shards, buffers.

    average: also one of the masters.
    """
    trained = sum(flat.numel() for flat in engine.optimizer.fp32_partitioned_groups_flat)
    kept = sum(buffer.nbytes for buffer in engine.module.buffers())
    for parameter in engine.module.parameters():
        if not parameter.requires_grad:
            kept += parameter.ds_tensor.nbytes
    return (16 if average else 12) * trained + kept + OVERHEAD_BYTES
