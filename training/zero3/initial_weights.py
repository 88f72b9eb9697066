"""Start from another run's weights, which any number of ranks may have saved."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed

from data_pipeline.errors import InputError
from training.zero3.saved_tensors import SavedTensor, saved_tensors


def load_weights(engine: Any, path: Path, world_size: int, vocabulary: int = 0) -> list[str]:
    """See `Engine.load_weights`; each rank reads its own part of every tensor.

    engine: DeepSpeed's.
    """
    from deepspeed.utils import safe_set_local_fp32_param

    saved = {tensor.name: tensor for tensor in saved_tensors(path, world_size)}
    parameters = dict(engine.module.named_parameters())
    _check(path, saved, parameters, vocabulary)
    rank = torch.distributed.get_rank()
    engine.optimizer.checkpoint_event_prologue()
    for name, parameter in parameters.items():
        shard = parameter.ds_tensor
        part = shard.detach().flatten().to("cpu", torch.float32, copy=True)
        _fill(part, rank * shard.numel(), saved[name])
        shard.data.copy_(part.view_as(shard))
        if parameter.requires_grad:  # the masters as they were saved, not as the model rounds them
            safe_set_local_fp32_param(parameter, part)
    engine.optimizer.checkpoint_event_epilogue()
    grown = [
        f"{name} has {parameter.ds_shape[0]} rows here, new from {saved[name].shape[0]} on"
        for name, parameter in parameters.items()
        if saved[name].shape != tuple(parameter.ds_shape)
    ]
    own = parameters.keys() | dict(engine.module.named_buffers()).keys()
    return [*grown, *(f"{name} is not in this model" for name in sorted(saved.keys() - own))]


def _fill(part: torch.Tensor, start: int, tensor: SavedTensor) -> None:
    """Put elements from `start` on of a saved tensor into `part`, as far as there are any."""
    place = 0
    for piece in tensor.pieces():
        first, last = max(start, place), min(start + len(part), place + len(piece))
        if first < last:
            part[first - start : last - start] = piece[first - place : last - place]
        place += len(piece)


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
