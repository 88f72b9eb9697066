"""Images of any patch grid to their tokens: the packed tower, then one launch of the projector.

I images, P patches, p pixels along a patch, D language width.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from data_pipeline.errors import InputError
from training.model.attention import ATTENTION_NAME
from training.model.hub.vision_siglip2_tokenflex import NativeFamily
from training.model.packed_tower import packed_patches
from training.profiling.step_phases import phase

Shapes = Sequence[Sequence[int]] | Tensor
"""H, W, h, w of each image, on the host: its patches, and its tokens; int [I, 4]."""


def native_features(model: Any, pixels: Tensor, shapes: Shapes) -> Tensor:
    """uint8 [P, p * p * 3] of the images, one after the other, to [sum of h * w, D], in order.

    A patch's pixels are row by row, channels last. Raises InputError for a model that has tiles
    only, and for pixels that are not those of the shapes.
    """
    config, tower = model.config, model.vision_model
    family, table = config.vision_family, torch.as_tensor(shapes)
    _check(config, tower)
    if table.ndim != 2 or table.shape[1] != 4 or table.device.type != "cpu" or not len(table):
        raise InputError(
            f"image_shapes is {tuple(table.shape)} on {table.device}; expected H, W, h, w of each "
            "image, on the host"
        )
    patches = int(table[:, :2].prod(1).sum())
    expected = (patches, config.vision_config.patch_size**2 * 3)
    if pixels.dtype != torch.uint8 or pixels.shape != expected:
        raise InputError(
            f"the pixels are {pixels.dtype} {tuple(pixels.shape)}; expected torch.uint8 "
            f"{expected} for the {len(table)} images of image_shapes"
        )
    with phase("vision"):
        mean = _per_channel(tuple(config.image_mean), pixels.device)
        std = _per_channel(tuple(config.image_std), pixels.device)
        by_channel = (pixels.unflatten(1, (-1, 3)).float() / 255 - mean) / std
        normal = by_channel.flatten(1).to(tower.dtype)
        grids = [(height, width) for height, width, *_ in table.tolist()]
        found = packed_patches(family, tower, normal, grids)
        with phase("projector"):
            tokens: Tensor = model.projector(found, table)
    return tokens


@lru_cache(maxsize=8)  # each copy to a device waits for it
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)


def _check(config: Any, tower: Any) -> None:
    if not isinstance(config.vision_family, NativeFamily):
        raise InputError(
            f"images of any shape need a tower of any patch grid, but the vision config's "
            f"model_type is {config.vision_config.model_type!r}; use siglip2_vision_model, or tiles"
        )
    if config.projector_method != "pool":
        raise InputError(
            f"images of any shape need the projector's method pool, not {config.projector_method}"
        )
    if tower.config._attn_implementation != ATTENTION_NAME:
        raise InputError(
            f"the tower's attention is {tower.config._attn_implementation}, which does not end at "
            f"the borders of packed images; build it with {ATTENTION_NAME}"
        )
