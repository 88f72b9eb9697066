"""SigLIP 2's NaFlex tower (arXiv 2502.14786): images of any patch grid, positions resized to it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, Siglip2VisionModel

from .vision_family_tokenflex import VisionFamily


@dataclass(frozen=True)
class NativeFamily(VisionFamily):
    """A vision transformer whose images have H x W patches each, any mix of them, without padding.

    A square tile is as large as the grid that its positions were trained on.
    """

    def check(self, config: PreTrainedConfig) -> None:
        """Raise ValueError unless the positions are a square grid."""
        if math.isqrt(config.num_patches) ** 2 != config.num_patches:
            raise ValueError(
                f"vision_config has num_patches {config.num_patches}, which is no square grid of "
                "positions; give the tower's own, 256 for 16 x 16"
            )

    def tile_size(self, config: PreTrainedConfig) -> int:
        """Side of a square tile in pixels."""
        return math.isqrt(config.num_patches) * config.patch_size

    def patch_grid(self, config: PreTrainedConfig) -> tuple[int, int]:
        """(rows, columns) of the patches of one tile."""
        side = math.isqrt(config.num_patches)
        return side, side

    def patches(self, tower: PreTrainedModel, pixels: Tensor) -> Tensor:
        """Normalised pixels [T, 3, tile_size, tile_size] -> patches [T, H*W, C], row by row."""
        rows, columns = grid = self.patch_grid(tower.config)
        size = tower.config.patch_size
        cells = pixels.unflatten(3, (columns, size)).unflatten(2, (rows, size))
        flat = cells.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        return self.encode(tower, self.embed(tower, flat, [grid]))

    def native_patches(
        self, tower: PreTrainedModel, pixels: Tensor, grids: Sequence[tuple[int, int]]
    ) -> Tensor:
        """Images of (H, W) patches each, one after the other -> their patches [P, C].

        pixels: normalised, [P, patch_size * patch_size * 3], P the sum of H * W; a patch's pixels
            row by row, channels last. Images of one grid are one batch of the tower.
        """
        alike: dict[tuple[int, int], list[int]] = {}
        for image, grid in enumerate(grids):
            alike.setdefault(grid, []).append(image)
        images = pixels.split([height * width for height, width in grids])
        found: list[Tensor] = [pixels] * len(grids)
        for grid, members in alike.items():
            batch = torch.stack([images[image] for image in members])
            states = self.encode(tower, self.embed(tower, batch, [grid]))
            for image, patches in zip(members, states, strict=True):
                found[image] = patches
        return torch.cat(found)

    def embed(
        self, tower: PreTrainedModel, pixels: Tensor, grids: Sequence[tuple[int, int]]
    ) -> Tensor:
        """Pixels [B, L, patch_size^2 * 3] with their positions, [B, L, C]; L the sum of H * W."""
        parts: Any = tower.embeddings
        # As modules, which ZeRO-3 gathers the weights of; the tower reads this one's weight itself.
        table = parts.position_embedding(torch.arange(parts.num_patches, device=pixels.device))
        side = parts.position_embedding_size
        square = table.unflatten(0, (side, side))
        resized = {grid: _resized(square, grid) for grid in dict.fromkeys(grids)}
        positions = torch.cat([resized[grid] for grid in grids])
        embedded: Tensor = parts.patch_embedding(pixels.to(table.dtype)) + positions
        return embedded

    def encode(self, tower: PreTrainedModel, embedded: Tensor, mask: Any = None) -> Tensor:
        """Embedded patches [B, L, C] -> patches [B, L, C].

        mask: what every attention layer gets for its mask, whatever its implementation takes; None:
            all patches of a row see each other.
        """
        parts: Any = tower
        states = parts.encoder(inputs_embeds=embedded, attention_mask=mask).last_hidden_state
        patches: Tensor = parts.post_layernorm(states)
        return patches


def _resized(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """A square table of positions [side, side, C] at the patches of a grid (H, W): [H * W, C].

    The same step as in the tower, by whole numbers, which a graph or an estimate can follow.
    """
    planes = positions.permute(2, 0, 1)[None]
    if planes.device.type == "cpu" and planes.dtype in (torch.bfloat16, torch.float16):
        planes = planes.float()  # there is no such resizing in half precision there
    planes = F.interpolate(planes, grid, mode="bilinear", align_corners=False, antialias=True)
    return planes[0].flatten(1).t().to(positions.dtype)


SIGLIP2 = NativeFamily(
    model_type="siglip2_vision_model",
    model_class=Siglip2VisionModel,
    # The head makes one vector of all patches, which nothing reads.
    fixed={"vision_use_head": False},
)
