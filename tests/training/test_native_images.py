"""Images of any shape in the trainer's model: features, gradients, and what it refuses."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.errors import InputError
from tests.ranks import RankPool
from tests.training.native_scenarios import Images, native_gradients, native_pack, native_pixels
from tests.training.tower_scenarios import NAFLEX
from training.model import PackedTokenFlex, TokenFlexConfig
from training.model.native_images import native_features

TEXT = {"model_type": "qwen2", "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48}
TEXT |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
IMAGES: Images = [(3, 5, 2, 3), (1, 40, 1, 13), (8, 8, 3, 3), (1, 1, 1, 1), (13, 9, 6, 4)]


def make_model(**changes: Any) -> Any:
    torch.manual_seed(0)
    config = TokenFlexConfig(
        **{"vision_config": NAFLEX, "text_config": TEXT, "image_token_id": 3, **changes}
    )
    return PackedTokenFlex._from_config(config, dtype=torch.float32)


def written_out(model: Any, pixels: Tensor, images: Images) -> Tensor:
    """Image by image: transformers' tower alone with it, means of windows, the SwiGLU."""
    p, found, start = model.projector, [], 0
    for height, width, h, w in images:
        image = pixels[start : start + height * width].float() / 255 * 2 - 1
        start += height * width
        shape = torch.tensor([[height, width]])
        model.vision_model.set_attn_implementation("sdpa")
        states = model.vision_model(image[None], torch.ones(1, len(image)), shape)
        grid = states.last_hidden_state[0].T.unflatten(1, (height, width))
        rows = F.adaptive_avg_pool2d(grid, (h, w)).flatten(1).T
        rows = F.layer_norm(rows, rows.shape[1:], p.norm_weight, p.norm_bias)
        gated = F.silu(F.linear(rows, p.w1, p.b1)) * F.linear(rows, p.w2, p.b2)
        found.append(F.linear(gated, p.w3, p.b3))
    return torch.cat(found)


@torch.no_grad()
def test_features_are_those_of_each_image_alone() -> None:
    model, pixels = make_model(), native_pixels(IMAGES, 0)
    found = native_features(model, pixels, IMAGES)
    assert torch.equal(found, native_features(model, pixels, torch.tensor(IMAGES)))
    torch.testing.assert_close(found, written_out(model, pixels, IMAGES), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_square_images_as_large_as_tiles_have_the_features_of_tiles() -> None:
    model = make_model(image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4])
    tiles = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    sides = [1, 8, 3]
    cells = tiles.unflatten(3, (8, 4)).unflatten(2, (8, 4)).permute(0, 2, 4, 3, 5, 1)
    rows = cells.flatten(3).flatten(0, 2)
    found = native_features(model, rows, [(8, 8, n, n) for n in sides])
    torch.testing.assert_close(found, model.image_features(tiles, sides), rtol=1e-5, atol=1e-5)


def test_a_pack_learns_from_its_images() -> None:
    model = make_model().train()
    pack = native_pack(IMAGES, 3)
    loss = model(**pack).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(p.grad.any() for p in model.vision_model.parameters())
    other = pack | {"pixel_values": pack["pixel_values"] // 2}
    assert model(**other).loss != loss


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"image_shapes": IMAGES[:-1]}, r"\(237, 48\).*\(120, 48\) for the 4"),
        ({"image_shapes": [(3, 5)]}, r"\(1, 2\).* H, W, h, w"),
        ({"pixel_values": native_pixels(IMAGES, 0).float()}, "torch.float32"),
        ({"image_shapes": [*IMAGES[:-1], (13, 9, 6, 3)]}, "53 image tokens.* 47 image features"),
        ({"labels": None, "position_ids": None, "cu_seqlens": None}, "image_shapes came without"),
    ],
)
def test_what_does_not_fit_together_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        make_model()(**native_pack(IMAGES, 3) | changes)


def test_models_that_have_tiles_only_are_named() -> None:
    siglip = {"model_type": "siglip_vision_model", "hidden_size": 32, "num_hidden_layers": 1}
    siglip |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 4}
    with pytest.raises(InputError, match=r"siglip_vision_model.* siglip2_vision_model"):
        make_model(vision_config=siglip)(**native_pack(IMAGES, 3))
    with pytest.raises(InputError, match="pool, not select"):
        make_model(projector_method="select")(**native_pack(IMAGES, 3))


@pytest.mark.multiprocess
def test_two_ranks_have_the_gradients_of_one_also_without_images(
    one_rank: RankPool, two_ranks: RankPool, digits_corpus: Path
) -> None:
    packs: list[Images] = [IMAGES, []]
    alone = one_rank.run(native_gradients, digits_corpus, packs)[0]
    for found in two_ranks.run(native_gradients, digits_corpus, packs):
        for name, gradient in alone.items():
            scale = max(np.abs(gradient).max(), 1e-3)
            np.testing.assert_allclose(found[name] / scale, gradient / scale, atol=1e-4)
