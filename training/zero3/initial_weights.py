"""Start from another run's weights, which any number of ranks may have saved."""

import math
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import nn

from data_pipeline.errors import InputError
from training.adapters import StageAdapters, piece_of, plain_name
from training.model.new_rows import NEW_ROWS
from training.zero3.saved_tensors import SavedTensor, new_rows_of, saved_tensors, whole_of


def load_weights(
    engine: Any,
    path: Path,
    world_size: int,
    vocabulary: int = 0,
    adapters: StageAdapters | None = None,
    apart: Collection[str] = (),
) -> list[str]:
    """See `Engine.load_weights`; each rank reads its own part of every tensor.

    engine: DeepSpeed's.
    """
    from deepspeed.utils import safe_set_local_fp32_param

    saved = {tensor.name: tensor for tensor in saved_tensors(path, world_size, adapters, apart)}
    parameters = dict(engine.module.named_parameters())
    plain = {
        plain_name(name): p
        for name, p in parameters.items()
        if f".{NEW_ROWS}." not in name and not piece_of(name)
    }
    _check(path, saved, plain, vocabulary)
    saved |= {rows.name: rows for rows in _new_rows(engine.module, saved)}
    rank = torch.distributed.get_rank()
    engine.optimizer.checkpoint_event_prologue()
    for name, parameter in parameters.items():
        source = _source(name, parameter, saved)
        if source is None:
            continue
        shard = parameter.ds_tensor
        part = shard.detach().flatten().to("cpu", torch.float32, copy=True)
        _fill(part, rank * shard.numel(), source)
        shard.data.copy_(part.view_as(shard))
        if parameter.requires_grad:  # the masters as they were saved, not as the model rounds them
            safe_set_local_fp32_param(parameter, part)
    engine.optimizer.checkpoint_event_epilogue()
    grown = [
        f"{name} has {parameter.ds_shape[0]} rows here, new from {saved[name].shape[0]} on"
        for name, parameter in plain.items()
        if saved[name].shape != tuple(parameter.ds_shape)
    ]
    own = plain.keys() | parameters.keys() | dict(engine.module.named_buffers()).keys()
    return [*grown, *(f"{name} is not in this model" for name in sorted(saved.keys() - own))]


def _source(name: str, parameter: Any, saved: dict[str, SavedTensor]) -> SavedTensor | None:
    """Where a parameter's values are; None for an adapter that starts anew, as it was made."""
    piece = piece_of(name)
    if piece is None or name in saved:
        return saved[plain_name(name)]
    if piece[1] != "lora_magnitude_vector":
        return None
    lengths = partial(_row_lengths, saved[piece[0]], parameter.ds_tensor.dtype)
    return SavedTensor(name, tuple(parameter.ds_shape), torch.float32, lengths)


def _row_lengths(matrix: SavedTensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """The length of each row of a matrix, which is rounded to `dtype` in the model."""
    yield whole_of(matrix).to(dtype).float().norm(dim=1)


def _fill(part: torch.Tensor, start: int, tensor: SavedTensor) -> None:
    """Put elements from `start` on of a saved tensor into `part`, as far as there are any."""
    place = 0
    for piece in tensor.pieces():
        first, last = max(start, place), min(start + len(part), place + len(piece))
        if first < last:
            part[first - start : last - start] = piece[first - place : last - place]
        place += len(piece)


def _new_rows(module: nn.Module, saved: dict[str, SavedTensor]) -> Iterator[SavedTensor]:
    """The saved rows of the tokens whose rows train here beside a frozen language model.

    Ids are in ascending order: a token that is new to the checkpoint is behind all others.
    """
    trained = {name for name, _ in module.named_parameters()}
    for name, whole in saved.items():
        if (rows := new_rows_of(name)) in trained:
            ids = module.get_buffer(new_rows_of(name, "ids")).tolist()
            known = [i for i in ids if i < whole.shape[0]]
            shape = (len(known), *whole.shape[1:])
            yield SavedTensor(rows, shape, torch.float32, partial(_selected, whole, known))


def _selected(whole: SavedTensor, ids: list[int]) -> Iterator[torch.Tensor]:
    """These rows of a tensor, read in one pass over its pieces."""
    width, place = math.prod(whole.shape[1:]), 0
    table = torch.empty(len(ids), width)
    for piece in whole.pieces():
        for row, start in zip(table, [i * width for i in ids], strict=True):
            first, last = max(place, start), min(place + len(piece), start + width)
            if first < last:
                row[first - start : last - start] = piece[first - place : last - place]
        place += len(piece)
    yield table.flatten()


def _check(
    path: Path, saved: dict[str, SavedTensor], parameters: dict[str, Any], vocabulary: int
) -> None:
    """InputError, naming them, if parameters lack in the checkpoint or have another shape.

    Those with a row for each of the `vocabulary` tokens may have fewer there.
    """
    shapes = {name: tuple(parameter.ds_shape) for name, parameter in parameters.items()}
    for name, shape in shapes.items():
        there = saved[name].shape if name in saved else ()
        if shape[0] == vocabulary and there[1:] == shape[1:] and 0 < there[0] < vocabulary:
            shapes[name] = there
    wrong = [
        f"{name} of shape {shape}" + (f", but of {saved[name].shape}" if name in saved else "")
        for name, shape in shapes.items()
        if name not in saved or saved[name].shape != shape
    ]
    if wrong:
        raise InputError(
            f"checkpoint.init_from={path} has no {'; '.join(wrong)}, so it is of another model; "
            "take one of this model section"
        )
