"""SigLIP 2 NaFlex on packs: transformers' padded forward, without the padding."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Siglip2VisionConfig, Siglip2VisionModel

from tests.ranks import RankPool
from tests.training.tower_scenarios import NAFLEX, Grids, some_pixels, tower_gradients
from training.model.attention import ATTENTION_NAME
from training.model.hub.vision_siglip2_tokenflex import SIGLIP2
from training.model.packed_tower import packed_patches

# A strip, a patch alone, one as the positions are, one of more, one twice.
GRIDS: Grids = [(3, 5), (1, 40), (8, 8), (1, 1), (3, 5), (13, 9), (7, 2)]


def make_towers() -> tuple[Any, Any]:
    """transformers' own, and the same weights with the trainer's attention."""
    torch.manual_seed(0)
    config = Siglip2VisionConfig(**NAFLEX, vision_use_head=False)
    own = Siglip2VisionModel._from_config(config, attn_implementation="sdpa")
    tower = SIGLIP2.build(Siglip2VisionConfig(**NAFLEX, vision_use_head=False), torch.float32)
    tower.load_state_dict(own.state_dict())
    tower.set_attn_implementation(ATTENTION_NAME)
    return own.train(), tower.train()


def padded(tower: Any, pixels: Tensor, grids: Grids) -> Tensor:
    """What transformers does: every image a row as long as the longest, the rest masked."""
    lengths = [height * width for height, width in grids]
    rows = torch.zeros(len(grids), max(lengths), pixels.shape[1])
    mask = torch.zeros(len(grids), max(lengths), dtype=torch.int32)
    for row, (length, image) in enumerate(zip(lengths, pixels.split(lengths), strict=True)):
        rows[row, :length], mask[row, :length] = image, 1
    states = tower(rows, mask, torch.tensor(grids)).last_hidden_state
    return torch.cat([state[:length] for state, length in zip(states, lengths, strict=True)])


def gradients(tower: Any, output: Tensor) -> dict[str, Tensor]:
    tower.zero_grad()
    output.pow(3).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in tower.named_parameters()}


@pytest.mark.parametrize("how", ["packed", "recomputed", "grouped"])
def test_forward_and_gradients_are_those_of_the_padded_tower(how: str) -> None:
    own, tower = make_towers()
    pixels = some_pixels(GRIDS, 0)
    if how == "recomputed":
        tower.gradient_checkpointing_enable()
    if how == "grouped":
        output = SIGLIP2.native_patches(tower, pixels, GRIDS)
    else:
        output = packed_patches(SIGLIP2, tower, pixels, GRIDS)
    expected = padded(own, pixels, GRIDS)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    found, wanted = gradients(tower, output), gradients(own, expected)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        # What a key's bias adds is the same for all keys of a query: rounding is left.
        scale = 10.0 if name.endswith("k_proj.bias") else gradient.abs().max().item()
        torch.testing.assert_close(found[name] / scale, gradient / scale, rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("poison", [1e4, float("nan")])
def test_no_image_sees_another(poison: float) -> None:
    tower = make_towers()[1]
    pixels = some_pixels(GRIDS, 0)
    clean = packed_patches(SIGLIP2, tower, pixels, GRIDS)
    pixels[15:55] = poison  # the second image
    found = packed_patches(SIGLIP2, tower, pixels, GRIDS)
    assert torch.equal(found[:15], clean[:15]) and torch.equal(found[55:], clean[55:])
    assert not torch.equal(found[15:55], clean[15:55])


@torch.no_grad()
def test_every_patch_of_an_image_sees_all_of_it() -> None:
    tower = make_towers()[1]
    pixels = some_pixels(GRIDS, 0)
    clean = packed_patches(SIGLIP2, tower, pixels, GRIDS)
    pixels[54] += 1  # the last patch of the second image
    changed = (packed_patches(SIGLIP2, tower, pixels, GRIDS) != clean).any(1)
    assert changed.nonzero().flatten().tolist() == list(range(15, 55))


@pytest.mark.multiprocess
def test_two_ranks_have_the_gradients_of_one(
    one_rank: RankPool, two_ranks: RankPool, digits_corpus: Path
) -> None:
    packs: list[Grids] = [GRIDS, [(2, 9)]]
    alone = one_rank.run(tower_gradients, digits_corpus, packs)[0]
    for found in two_ranks.run(tower_gradients, digits_corpus, packs):
        for name, gradient in alone.items():
            scale = 10.0 if name.endswith("k_proj.bias") else np.abs(gradient).max()
            np.testing.assert_allclose(found[name] / scale, gradient / scale, atol=1e-5)
