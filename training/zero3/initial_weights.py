"""Start from another run's weights, which any number of ranks may have saved."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed

from data_pipeline.errors import InputError
from training.zero3.saved_tensors import SavedTensor, saved_tensors


def load_weights(engine: Any, path: Path, world_size: int) -> list[str]:
    """See `Engine.load_weights`; each rank reads its own part of every tensor.

    engine: DeepSpeed's.
    """
    from deepspeed.utils import safe_set_local_fp32_param

    saved = {tensor.name: tensor for tensor in saved_tensors(path, world_size)}
    parameters = dict(engine.module.named_parameters())
    _check(path, saved, parameters)
    rank = torch.distributed.get_rank()
    engine.optimizer.checkpoint_event_prologue()
    for name, parameter in parameters.items():
        shard = parameter.ds_tensor
        part = _part(saved[name], rank * shard.numel(), shard.numel())
        shard.data.copy_(part.view_as(shard))
        if parameter.requires_grad:  # the masters as they were saved, not as the model rounds them
            safe_set_local_fp32_param(parameter, part)
    engine.optimizer.checkpoint_event_epilogue()
    return sorted(saved.keys() - parameters.keys() - dict(engine.module.named_buffers()).keys())


def _part(tensor: SavedTensor, start: int, size: int) -> torch.Tensor:
    """Elements `start` to `start + size` in fp32, [size]; zeros beyond the tensor's end."""
    part, place = torch.zeros(size), 0
    for piece in tensor.pieces():
        first, last = max(start, place), min(start + size, place + len(piece))
        if first < last:
            part[first - start : last - start] = piece[first - place : last - place]
        place += len(piece)
    return part


def _check(path: Path, saved: dict[str, SavedTensor], parameters: dict[str, Any]) -> None:
    """InputError, naming them, if parameters lack in the checkpoint or have another shape."""
    shapes = {name: tuple(parameter.ds_shape) for name, parameter in parameters.items()}
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
