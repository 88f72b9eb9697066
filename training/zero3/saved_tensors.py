"""The weights in a checkpoint's shards, for export: neither an engine nor a process group."""

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.errors import InputError
from training.adapters import AdapterSettings, StageAdapters, merged, piece_of, plain_name
from training.model.new_rows import NEW_ROWS
from training.zero3.shards import Shards, piece_of_flat


@dataclass(frozen=True)
class SavedTensor:
    """A parameter or buffer as it was saved: `pieces` reads its elements, flat and in order."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Callable[[], Iterator[Tensor]]


def saved_tensors(
    path: Path,
    world_size: int,
    adapters: StageAdapters | None = None,
    apart: Collection[str] = (),
    ema: bool = False,
) -> Iterator[SavedTensor]:
    """Every parameter, trained or frozen, and buffer of a verified checkpoint.

    Trained ones are the fp32 masters. Rows of new tokens that trained beside a frozen language
    model are in their places, and adapters are merged into their matrices, which makes that
    parameter fp32, too. The shards are mapped into memory; `pieces` reads them.

    Args:
        path: the checkpoint's folder.
        world_size: how many ranks saved it.
        adapters: what they were saved with.
        apart: parts of the model whose adapters are not merged, but given by their own names.
        ema: the moving average of what trained, instead of its masters.

    Raises:
        InputError: if there is no moving average, the shards do not hold what they list, or
            adapters that are not given.
    """
    found = {tensor.name: tensor for tensor in _stored(path, world_size, ema)}
    small = adapters_among(found)
    if unknown := {plain.partition(".")[0] for plain in small} - (adapters or _NONE).given.keys():
        raise InputError(
            f"{path} holds adapters of {', '.join(sorted(unknown))} without their settings; it was "
            "changed, or is of another version"
        )
    for name, tensor in found.items():
        rows, plain = found.get(new_rows_of(name)), plain_name(name)
        if rows:
            ids = found[new_rows_of(name, "ids")]
            pieces = partial(_with_rows, tensor, rows, ids)
            yield replace(tensor, dtype=torch.float32, pieces=pieces)
        elif plain in small and (part := plain.partition(".")[0]) not in apart:
            pieces = partial(_merged, tensor, small[plain], (adapters or _NONE).given[part])
            yield replace(tensor, name=plain, dtype=torch.float32, pieces=pieces)
        elif piece_of(name):
            if name.partition(".")[0] in apart:
                yield tensor
        elif f".{NEW_ROWS}." not in name:
            yield replace(tensor, name=plain)


_NONE = StageAdapters()


def adapters_among(found: dict[str, SavedTensor]) -> dict[str, dict[str, SavedTensor]]:
    """The parts of adapters among stored tensors, by the plain name of their matrix."""
    small: dict[str, dict[str, SavedTensor]] = {}
    for name, tensor in found.items():
        if piece := piece_of(name):
            small.setdefault(piece[0], {})[piece[1]] = tensor
    return small


def _merged(
    matrix: SavedTensor, pieces: dict[str, SavedTensor], settings: AdapterSettings
) -> Iterator[Tensor]:
    """The elements of a matrix with its adapter in it, all at once."""
    small = {name: whole_of(piece) for name, piece in pieces.items()}
    yield merged(whole_of(matrix), small, settings).flatten()


def whole_of(tensor: SavedTensor) -> Tensor:
    """A saved tensor, read, as fp32."""
    return torch.cat([piece.float() for piece in tensor.pieces()]).view(tensor.shape)


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


def _stored(path: Path, world_size: int, ema: bool) -> Iterator[SavedTensor]:
    """As `saved_tensors`, as they are stored."""
    shards = Shards(path, world_size)
    first = shards.model(0)
    groups, start = shards.averages if ema else shards.masters, 0
    for name, shape in shards.shapes().items():
        size = math.prod(shape)
        pieces = partial(piece_of_flat, groups, world_size, size, start)
        yield SavedTensor(name, shape, torch.float32, pieces)
        start += -(-size // world_size)
    if (held := sum(len(group) for group in groups(0))) != start:
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
