"""The weights in a checkpoint's shards, for export: neither an engine nor a process group."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.errors import InputError
from training.model.new_rows import NEW_ROWS
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

    Trained ones are the fp32 masters. Rows of new tokens that trained beside a frozen language
    model are in their places, which makes that parameter fp32, too. The shards are mapped into
    memory; `pieces` reads them.

    Args:
        path: the checkpoint's folder.
        world_size: how many ranks saved it.

    Raises:
        InputError: if the shards do not hold what they list.
    """
    found = {tensor.name: tensor for tensor in _stored(path, world_size)}
    for name, tensor in found.items():
        rows = found.get(new_rows_of(name))
        if rows:
            ids = found[new_rows_of(name, "ids")]
            pieces = partial(_with_rows, tensor, rows, ids)
            yield replace(tensor, dtype=torch.float32, pieces=pieces)
        elif f".{NEW_ROWS}." not in name:
            yield tensor


def new_rows_of(name: str, leaf: str = "") -> str:
    """The name of what holds the rows of new tokens that lie over a parameter; or of their ids."""
    module, _, own = name.rpartition(".")
    return f"{module}.{NEW_ROWS}.{leaf or own}"


def _with_rows(tensor: SavedTensor, rows: SavedTensor, ids: SavedTensor) -> Iterator[Tensor]:
    """The pieces of a tensor, in fp32, with other rows at these ids."""
    table = torch.cat([*rows.pieces()]).view(rows.shape[0], -1)
    width, place = table.shape[1], 0
    starts = [int(i) * width for i in torch.cat([*ids.pieces()])]
    for piece in tensor.pieces():
        whole = piece.to(torch.float32, copy=True)
        for start, row in zip(starts, table, strict=True):
            first, last = max(place, start), min(place + len(piece), start + width)
            if first < last:
                whole[first - place : last - place] = row[first - start : last - start]
        yield whole
        place += len(piece)


def _stored(path: Path, world_size: int) -> Iterator[SavedTensor]:
    """As `saved_tensors`, as they are stored."""
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
