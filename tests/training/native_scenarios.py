"""Packs of images of any shape, and the gradients of steps made of them on real engines."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor

from data_pipeline.tokenizer import load_tokenizer
from tests.training.scenarios import tiny_config
from tests.training.tower_scenarios import NAFLEX
from training.distributed import Ranks
from training.zero3.engine import build_engine

Images = list[tuple[int, int, int, int]]
"""H, W, h, w of each."""


def native_pixels(images: Images, seed: int) -> Tensor:
    """uint8 [P, patch_size^2 * 3] of images in the tower `NAFLEX`."""
    count = sum(height * width for height, width, *_ in images)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 4 * 4 * 3), generator=generator, dtype=torch.uint8)


def native_pack(images: Images, image_id: int, seed: int = 0) -> dict[str, Any]:
    """Two samples, the first with all the images and text behind them, the second text alone."""
    tokens = sum(h * w for *_, h, w in images)
    lengths = [tokens + 5, 6]
    ids = torch.arange(sum(lengths)) % 7 + 20
    ids[:tokens] = image_id
    labels = torch.where(torch.arange(sum(lengths)) % 3 == 1, ids, -100)
    labels[:tokens] = labels[lengths[0]] = -100
    pixels = {"pixel_values": native_pixels(images, seed), "image_shapes": images}
    return {
        "input_ids": ids[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int(),
        "max_seqlen": max(lengths),
        "labels": labels[None],
        **(pixels if images else {}),
    }


def native_gradients(ranks: Ranks, corpus: Path, packs: list[Images]) -> dict[str, np.ndarray]:
    """Whole gradients of a step made of these packs, in turn on the ranks."""
    settings = [f"model.vision.config={NAFLEX}", f"data.pack.packs_per_step={len(packs)}"]
    config = tiny_config(corpus, *settings)
    engine = build_engine(config, load_tokenizer(corpus / "tokenizer.model"), ranks)
    model: Any = engine.module
    mine = list(enumerate(packs))[ranks.rank :: ranks.world_size]
    for number, images in mine:
        last = number == mine[-1][0]
        engine.deepspeed.set_gradient_accumulation_boundary(last)
        pack = native_pack(images, model.config.image_token_id, number)
        engine.backward(engine(**pack).loss, last=last)
    return {
        name: safe_get_full_grad(parameter).detach().numpy().copy() * ranks.world_size
        for name, parameter in model.named_parameters()
    }
