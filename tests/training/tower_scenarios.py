"""A packed tower on every rank: small real engines, images of a grid of their own on each."""

from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor

from data_pipeline.tokenizer import load_tokenizer
from tests.training.scenarios import tiny_config
from training.distributed import Ranks
from training.model.packed_tower import packed_patches
from training.zero3.engine import build_engine

Grids = list[tuple[int, int]]
NAFLEX: dict[str, Any] = {
    "model_type": "siglip2_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
}
NAFLEX |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_patches": 64, "patch_size": 4}


def some_pixels(grids: Grids, seed: int) -> Tensor:
    """[P, patch_size^2 * 3], of the images of these grids."""
    count = sum(height * width for height, width in grids)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4 * 4 * 3, generator=generator)


def tower_gradients(ranks: Ranks, corpus: Path, packs: list[Grids]) -> dict[str, np.ndarray]:
    """Whole gradients of the tower of a step made of these packs, in turn on the ranks."""
    settings = [f"model.vision.config={NAFLEX}", f"data.pack.packs_per_step={len(packs)}"]
    config = tiny_config(corpus, *settings)
    engine = build_engine(config, load_tokenizer(corpus / "tokenizer.model"), ranks)

    def tower_alone(model: Any, pixels: Tensor, grids: Grids) -> Tensor:
        family = model.config.vision_family
        return packed_patches(family, model.vision_model, pixels, grids).pow(3).sum()

    engine.module.forward = MethodType(tower_alone, engine.module)
    mine = list(enumerate(packs))[ranks.rank :: ranks.world_size]
    for number, grids in mine:
        loss = engine(some_pixels(grids, number), grids)
        if number == mine[-1][0]:
            engine.deepspeed.set_gradient_accumulation_boundary(True)
        engine.backward(loss, last=number == mine[-1][0])
    tower: Any = engine.module.vision_model
    return {
        name: safe_get_full_grad(parameter).detach().numpy().copy() * ranks.world_size
        for name, parameter in tower.named_parameters()
    }
