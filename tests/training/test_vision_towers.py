"""Families of vision towers: each is one file, and a new one needs nothing else of the model."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModel, CLIPConfig, CLIPModel, Dinov2Model
from transformers.models.siglip2 import image_processing_pil_siglip2 as siglip2

from data_pipeline.corpus import cost_of
from data_pipeline.errors import InputError
from data_pipeline.tokenizer import load_tokenizer
from tests.data_pipeline.test_cost import linear_weights
from tests.ranks import RankPool
from tests.training import scenarios
from training.config import load_config
from training.model import TokenFlexConfig, TokenFlexForConditionalGeneration
from training.model.build import build_model
from training.model.hub.vision_family_tokenflex import VisionFamily
from training.model.hub.vision_towers_tokenflex import FAMILIES

TILE, GRID, WIDTH = 24, 4, 16
BLOCK = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION: dict[str, dict[str, Any]] = {
    "siglip_vision_model": BLOCK | {"intermediate_size": 24},
    "clip_vision_model": BLOCK | {"intermediate_size": 24},
    "siglip2_vision_model": BLOCK | {"intermediate_size": 24},
    "dinov2": BLOCK | {"mlp_ratio": 3},
}
CLIP_VISION = VISION["clip_vision_model"] | {"image_size": 32, "patch_size": 4}
TEXT = {"model_type": "qwen2", "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48}
TEXT |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}


@pytest.fixture(params=VISION)
def vision(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A tiny config of each family; DINOv2 comes as from a file of one's own."""
    dinov2 = VisionFamily(
        "dinov2", Dinov2Model, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), leading_tokens=1
    )
    monkeypatch.setitem(FAMILIES, "dinov2", dinov2)
    return {"model_type": request.param, **VISION[request.param], **sized(request.param, TILE)}


def sized(family: str, tile: int, patch: int = TILE // GRID) -> dict[str, int]:
    """Config keys that make tiles of a family so large."""
    native = family == "siglip2_vision_model"
    size = {"num_patches": (tile // patch) ** 2} if native else {"image_size": tile}
    return {**size, "patch_size": patch}


def make_model(vision: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = TokenFlexConfig(vision_config=vision, text_config=TEXT, image_token_id=3)
    return TokenFlexForConditionalGeneration(config).eval()


def overrides(**changes: Any) -> list[str]:
    """The digits run with a CLIP tower of its tile size."""
    return [f"model.vision.{key}={value}" for key, value in changes.items()]


def clip_overrides(**changes: Any) -> list[str]:
    config = {"model_type": "clip_vision_model", **CLIP_VISION}
    return overrides(config=config, **changes)


@torch.no_grad()
def test_patches_are_those_of_the_pixels_in_reading_order(vision: dict[str, Any]) -> None:
    model = make_model(vision | {"num_hidden_layers": 0})  # no attention: a patch sees its pixels
    family, tower, side = model.config.vision_family, model.model.vision_model, TILE // GRID
    assert model.config.patch_grid == (GRID, GRID)
    blank = family.patches(tower, torch.zeros(1, 3, TILE, TILE))
    assert blank.shape == (1, GRID * GRID, WIDTH)
    for row, column in ((0, 0), (1, 2), (3, 3)):
        pixels = torch.zeros(1, 3, TILE, TILE)
        pixels[..., row * side : (row + 1) * side, column * side : (column + 1) * side] = 1
        changed = (family.patches(tower, pixels) != blank).any(-1)[0]
        assert changed.nonzero().flatten().tolist() == [row * GRID + column]


def own_patches(tower: Any, pixels: torch.Tensor) -> torch.Tensor:
    """What the tower itself makes of normalised tiles."""
    arguments = {"pixel_values": pixels}
    if tower.config.model_type == "siglip2_vision_model":
        size = tower.config.patch_size
        cut = [siglip2.convert_image_to_patches(tile.numpy(), size) for tile in pixels]
        arguments["pixel_values"] = torch.stack([torch.from_numpy(patches) for patches in cut])
        arguments["pixel_attention_mask"] = torch.ones(len(pixels), GRID * GRID)
        arguments["spatial_shapes"] = torch.tensor([[GRID, GRID]] * len(pixels))
    patches: torch.Tensor = tower(**arguments).last_hidden_state[:, -GRID * GRID :]
    return patches


@torch.no_grad()
def test_features_are_the_projected_patches_of_the_towers_own_code(vision: dict[str, Any]) -> None:
    model = make_model(vision)
    tower = AutoModel.from_config(AutoConfig.for_model(**vision)).eval()
    missing, unexpected = tower.load_state_dict(model.model.vision_model.state_dict(), strict=False)
    assert not unexpected and all(name.startswith("head.") for name in missing)
    tiles = torch.randint(0, 256, (2, 3, TILE, TILE), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.config.image_mean,
                                                         model.config.image_std))  # fmt: skip
    patches = own_patches(tower, (tiles / 255 - mean) / std)
    p = model.model.projector
    rows = F.layer_norm(patches.flatten(0, 1), (WIDTH,), p.norm_weight, p.norm_bias)
    gated = F.silu(F.linear(rows, p.w1, p.b1)) * F.linear(rows, p.w2, p.b2)
    expected = F.linear(gated, p.w3, p.b3)
    torch.testing.assert_close(model.model.image_features(tiles, [GRID, GRID]), expected)


def test_the_cost_needs_no_code_of_a_family(vision: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = make_model(vision)
    cost = cost_of(vision, TEXT)
    assert cost.vision_parameters == linear_weights(model.model.vision_model)
    assert (cost.vision_layers, cost.vision_width) == (2, WIDTH)
    assert cost.patches_per_tile == GRID * GRID


def test_a_saved_model_is_the_same_model(vision: dict[str, Any], tmp_path: Path) -> None:
    model = make_model(vision)
    model.save_pretrained(tmp_path)
    again = TokenFlexForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert again.config.image_mean == model.config.image_mean
    tiles = torch.randint(0, 256, (1, 3, TILE, TILE), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(
            again.model.image_features(tiles, [3]), model.model.image_features(tiles, [3])
        )


def test_pretrained_weights_come_from_a_folder(
    vision: dict[str, Any], digits_corpus: Path, tmp_path: Path
) -> None:
    vision |= sized(vision["model_type"], 32, 4)
    tower = AutoModel.from_config(AutoConfig.for_model(**vision))
    tower.save_pretrained(tmp_path)
    run = scenarios.tiny_config(digits_corpus, *overrides(config=vision, pretrained=tmp_path))
    model: Any = build_model(run, load_tokenizer(digits_corpus / "tokenizer.model"))
    expected = tower.state_dict()
    for name, value in model.vision_model.state_dict().items():
        assert torch.equal(value.float(), expected[name].to(value.dtype).float()), name


def test_a_clip_checkpoint_of_both_towers_gives_the_vision_tower(
    digits_corpus: Path, tmp_path: Path
) -> None:
    text = {key: value for key, value in TEXT.items() if key != "model_type"}
    vision = CLIP_VISION | {"projection_dim": 8}  # of a projection that the tower does not have
    both = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=8))
    both.save_pretrained(tmp_path)
    run = scenarios.tiny_config(digits_corpus, *clip_overrides(pretrained=tmp_path))
    model: Any = build_model(run, load_tokenizer(digits_corpus / "tokenizer.model"))
    expected = both.vision_model.state_dict()
    for name, value in model.vision_model.state_dict().items():
        assert torch.equal(value, expected[name].to(value.dtype)), name


def test_a_tower_of_another_family_is_refused(digits_corpus: Path, tmp_path: Path) -> None:
    siglip = load_config("training/configs/digits.yaml").model.vision.config
    AutoModel.from_config(AutoConfig.for_model(**siglip)).save_pretrained(tmp_path)
    run = scenarios.tiny_config(digits_corpus, *clip_overrides(pretrained=tmp_path))
    with pytest.raises(InputError, match="'siglip_vision_model' there and 'clip_vision_model'"):
        build_model(run, load_tokenizer(digits_corpus / "tokenizer.model"))


@pytest.mark.parametrize("family", ["clip_vision_model", "siglip2_vision_model"])
@pytest.mark.multiprocess
def test_a_tower_trains_partitioned(two_ranks: RankPool, digits_corpus: Path, family: str) -> None:
    vision = {"model_type": family, **VISION[family], **sized(family, 32, 4)}
    settings = overrides(config=vision)
    before, after = two_ranks.run(scenarios.train_steps, digits_corpus, 2, settings)[0]
    same = {name for name, value in after.items() if (value == before[name]).all()}
    # What only CLIP's pooled vector passes is not part of the loss.
    unused = {f"vision_model.post_layernorm.{kind}" for kind in ("weight", "bias")}
    unused = unused if family == "clip_vision_model" else set()
    assert unused <= same and not any(name.startswith("vision_model") for name in same - unused)


def test_positions_that_are_no_square_and_tiles_of_another_size_are_named(
    digits_corpus: Path,
) -> None:
    vision: dict[str, Any] = {"model_type": "siglip2_vision_model", **BLOCK, "num_patches": 60}
    with pytest.raises(ValueError, match=r"num_patches 60.* square"):
        make_model(vision)
    settings = [*overrides(config=vision | {"num_patches": 64, "patch_size": 4})]
    with pytest.raises(InputError, match=r"tile_size is 48 .*num_patches and patch_size make 32"):
        scenarios.tiny_config(digits_corpus, *settings, "data.tiling.tile_size=48")
