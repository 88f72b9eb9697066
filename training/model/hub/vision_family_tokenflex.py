"""What the model asks of a family of vision towers: config, tower, patches."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class VisionFamily:
    """Vision transformers of one resolution that cut a square tile into square patches.

    A family whose patches are made or ordered otherwise overrides `patch_grid` and `patches`.

    model_type: of its config in transformers.
    model_class: builds the tower and loads its weights, also those of a checkpoint that holds more.
    image_mean, image_std: what its pretrained weights expect, per channel, of pixels in 0..1.
    leading_tokens: how many the tower puts before the patches: class and register tokens.
    fixed: config keys that have one value here, whatever a checkpoint says, because they do not
        change the patches.
    """

    model_type: str
    model_class: type[PreTrainedModel]
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    leading_tokens: int = 0
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def complete(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The tower's config, also from that of a checkpoint that holds more; `fixed` is set."""
        config = getattr(config, "vision_config", config)
        for key, value in self.fixed.items():
            setattr(config, key, value)
        return config

    def check(self, config: PreTrainedConfig) -> None:
        """Raise ValueError unless a tile holds a patch."""
        if config.image_size < config.patch_size:
            raise ValueError(
                f"vision_config has image_size {config.image_size} below its patch_size "
                f"{config.patch_size}; a tile must hold at least one patch"
            )

    def build(self, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
        """A tower with random weights."""
        tower = self.model_class._from_config(config, dtype=dtype)
        # Older releases keep the tower one level deeper: weights have the names of the newer ones.
        return getattr(tower, "vision_model", tower)

    def tile_size(self, config: PreTrainedConfig) -> int:
        """Side of a square tile in pixels."""
        size: int = config.image_size
        return size

    def patch_grid(self, config: PreTrainedConfig) -> tuple[int, int]:
        """(rows, columns) of the patches of one tile."""
        side = config.image_size // config.patch_size
        return side, side

    def patches(self, tower: PreTrainedModel, pixels: Tensor) -> Tensor:
        """Normalised pixels [T, 3, tile_size, tile_size] -> patches [T, H*W, C], row by row."""
        return tower(pixel_values=pixels).last_hidden_state[:, self.leading_tokens :]
