"""The weights in a checkpoint's shards, for export: neither an engine nor a process group."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.errors import InputError
from training.zero3.shards import Shards


@dataclass(frozen=True)
class SavedTensor:
    """A parameter or buffer as it was saved: `pieces` reads its elements, flat and in order."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Callable[[], Iterator[Tensor]]


def saved_tensors(path: Path, world_size: int) -> Iterator[SavedTensor]:
    """Every parameter, trained or frozen, and buffer of a verified checkpoint.

    Trained ones are the fp32 masters. The shards are mapped into memory; `pieces` reads them.

    Args:
        path: the checkpoint's folder.
        world_size: how many ranks saved it.

    Raises:
        InputError: if the shards do not hold what they list.
    """
    shards = Shards(path, world_size)
    first = shards.model(0)
    start = 0
    for name, shape in shards.shapes().items():
        size = math.prod(shape)
        yield SavedTensor(name, shape, torch.float32, partial(_masters, shards, size, start))
        start += -(-size // world_size)
    if (held := sum(len(group) for group in shards.masters(0))) != start:
        raise InputError(
            f"{path} holds {held} master weights per rank where its parameters need {start}; "
            "export it with the version that saved it"
        )
    for name, shape in (first["frozen_param_shapes"] or {}).items():
        size, kind = math.prod(shape), first["frozen_param_fragments"][name].dtype
        yield SavedTensor(name, tuple(shape), kind, partial(shards.frozen, name, size, 0, size))
    for name in first["buffer_names"]:
        buffer = first["module"][name]
        pieces = partial(iter, [buffer.flatten()])
        yield SavedTensor(name, tuple(buffer.shape), buffer.dtype, pieces)


def _masters(shards: Shards, size: int, start: int) -> Iterator[Tensor]:
    """The masters of a parameter in order; `start` is its place in each rank's part."""
    part = -(-size // shards.world_size)
    for rank in range(shards.world_size):
        left, offset = min(part, size - rank * part), start
        for group in shards.masters(rank):
            if left > 0 and offset < len(group):
                piece = group[offset : offset + left]
                yield piece
                left, offset = left - len(piece), offset + len(piece)
            offset -= len(group)
