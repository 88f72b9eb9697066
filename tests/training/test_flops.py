"""FLOPs of a pack, against what PyTorch counts while the model runs forward and backward."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from training.adapters import add_adapters
from training.config import TrainSettings
from training.flops import PackCost, peak_flops
from training.metrics.rank_times import RankTimes
from training.model import PackedTokenFlex, TokenFlexConfig
from training.model.new_rows import train_new_rows
from training.parameters import freeze, recompute_activations

VISION: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 4,
}
TEXT: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
IMAGE = 7
LENGTHS = [96, 32, 48, 256]  # as the blocks that attention runs in are long: nothing is rounded up
aten = torch.ops.aten


def _attention(*shapes: Any, **_: Any) -> int:
    return sdpa_flop_count(*(tensor.shape for tensor in shapes[:3]))


def _attention_backward(*shapes: Any, **_: Any) -> int:
    return sdpa_backward_flop_count(*(tensor.shape for tensor in shapes[:4]))


for _formula in (_attention, _attention_backward):
    _formula._get_raw = True  # type: ignore[attr-defined]
# PyTorch counts the attention of GPUs only.
ON_CPU = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def settings(*frozen: str, **train: Any) -> TrainSettings:
    return TrainSettings(steps=1, modules={name: {"train": False} for name in frozen}, **train)


def pack(sides: list[int]) -> dict[str, Tensor | list[int] | int]:
    """Model inputs: the tiles' tokens lead, every third token is supervised."""
    tokens = sum(LENGTHS)
    ids = torch.full((1, tokens), 9)
    ids[0, : sum(n * n for n in sides)] = IMAGE
    labels = torch.where(torch.arange(tokens) % 3 == 1, ids[0], -100)[None]
    ends = torch.tensor([0, *LENGTHS]).cumsum(0)
    return {
        "input_ids": ids,
        "position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None],
        "pixel_values": torch.zeros(len(sides), 3, 32, 32, dtype=torch.uint8),
        "tile_sides": sides,
        "cu_seqlens": ends.to(torch.int32),
        "max_seqlen": max(LENGTHS),
        "labels": labels,
    }


def run(config: TokenFlexConfig, train: TrainSettings, sides: list[int], chunks: int) -> float:
    """What PyTorch counts."""
    torch.manual_seed(0)
    model = PackedTokenFlex._from_config(config, dtype=torch.float32).train()
    model.projector.backward_mode = train.projector_backward
    freeze(model, train.modules)
    if train.modules.language_model.train == "new_tokens":
        train_new_rows(model, [7, 9])
    add_adapters(model, train.adapters, seed=0)
    if train.recomputed:
        recompute_activations(model, train.recomputed)
    with FlopCounterMode(display=False, custom_mapping=ON_CPU) as counter:
        model(**pack(sides), loss_chunks=chunks).loss.backward()
    return float(counter.get_total_flops())


MANY = [8, 4, 2, 8, 6, 1, 3]
CHECKPOINTED = {"gradient_checkpointing": True}


@pytest.mark.parametrize(
    ("train", "sides", "chunks", "vision", "text"),
    [
        pytest.param(settings(), [], 1, {}, {}, id="text only"),
        pytest.param(settings(), MANY, 1, {}, {}, id="many tiles"),
        pytest.param(settings("vision_model"), MANY, 1, {}, {}, id="frozen tower"),
        pytest.param(settings("language_model"), MANY, 1, {}, {}, id="frozen language model"),
        pytest.param(settings("vision_model", "language_model"), MANY, 1, {}, {}, id="projector"),
        pytest.param(settings("vision_model", "projector"), MANY, 1, {}, {}, id="decoder"),
        pytest.param(
            TrainSettings(steps=1, modules={"language_model": {"train": "new_tokens"}}),
            *(MANY, 1, {}, {}),
            id="rows of new tokens",
        ),
        pytest.param(settings("projector"), MANY, 1, {}, {}, id="frozen projector"),
        pytest.param(settings(**CHECKPOINTED), MANY, 1, {}, {}, id="checkpointing"),
        pytest.param(
            settings("vision_model", **CHECKPOINTED), MANY, 3, {}, {}, id="checkpointing, frozen"
        ),
        pytest.param(
            settings("language_model", **CHECKPOINTED), MANY, 1, {}, {}, id="frozen, checkpointing"
        ),
        pytest.param(
            settings(gradient_checkpointing=["vision_model"]), MANY, 1, {}, {}, id="tower again"
        ),
        pytest.param(
            settings(gradient_checkpointing=["language_model"]), MANY, 1, {}, {}, id="decoder again"
        ),
        pytest.param(settings(), MANY, 4, {}, {}, id="loss in slices"),
        pytest.param(settings(), MANY, 1, {}, {"tie_word_embeddings": True}, id="tied head"),
        pytest.param(settings(), MANY, 1, {}, {"num_key_value_heads": 8}, id="no groups of heads"),
        pytest.param(
            settings(**CHECKPOINTED),
            MANY,
            2,
            {"model_type": "clip_vision_model"},
            {"model_type": "gpt_neox", "num_key_value_heads": 8},
            id="CLIP and another decoder",
        ),
        pytest.param(
            *(settings(**CHECKPOINTED), MANY, 1),
            {"model_type": "siglip2_vision_model", "num_patches": 64},
            {},
            id="NaFlex",
        ),
    ],
)
def test_counted_as_pytorch_counts(
    train: TrainSettings,
    sides: list[int],
    chunks: int,
    vision: dict[str, Any],
    text: dict[str, Any],
) -> None:
    config = TokenFlexConfig(
        vision_config=VISION | vision, text_config=TEXT | text, image_token_id=IMAGE
    )
    assert_counted(config, train, sides, chunks)


@pytest.mark.parametrize("pool", ["adaptive", "resize"])
@pytest.mark.parametrize("backward", ["save", "recompute"])
def test_the_projector_is_counted_in_both_modes(pool: str, backward: str) -> None:
    assert_counted(config_of(pool=pool), settings(projector_backward=backward), MANY, 1)


LORA: dict[str, Any] = {"r": 12}
FROZEN_BOTH = ("vision_model", "language_model")


@pytest.mark.parametrize(
    ("frozen", "adapters", "train"),
    [
        pytest.param(FROZEN_BOTH, {"language_model": LORA}, {}, id="language model"),
        pytest.param(FROZEN_BOTH, {"language_model": LORA}, CHECKPOINTED, id="checkpointing"),
        pytest.param(
            FROZEN_BOTH,
            {"language_model": LORA | {"target_modules": ["q_proj", "up_proj"]}},
            CHECKPOINTED,
            id="some layers, checkpointing",
        ),
        pytest.param(FROZEN_BOTH, {"language_model": LORA | {"use_dora": True}}, {}, id="DoRA"),
        pytest.param(("projector",), {"projector": LORA}, {}, id="projector"),
        pytest.param(
            ("projector",),
            {"projector": LORA | {"target_modules": ["w3"]}},
            {},
            id="a matrix of it",
        ),
        pytest.param(
            (*FROZEN_BOTH, "projector"),
            {"vision_model": LORA, "projector": LORA, "language_model": LORA},
            CHECKPOINTED,
            id="everywhere",
        ),
    ],
)
def test_adapters_and_what_they_lie_beside_are_counted(
    frozen: tuple[str, ...], adapters: dict[str, Any], train: dict[str, Any]
) -> None:
    """The tower's lowest products need no gradient of their input, which is not left out."""
    near = 0.03 if "vision_model" in adapters else 0.01
    config, stage = config_of(), settings(*frozen, adapters=adapters, **train)
    found = PackCost(config, stage, 1, masked=True).pack(LENGTHS, MANY, SUPERVISED)
    expected = run(config, stage, MANY, 1)
    assert sum(part.hardware for part in found.values()) == pytest.approx(expected, rel=near)


SUPERVISED = sum((i % 3 == 1) for i in range(sum(LENGTHS)))


def assert_counted(
    config: TokenFlexConfig, train: TrainSettings, sides: list[int], chunks: int
) -> None:
    cost = PackCost(config, train, chunks, masked=True)
    found = cost.pack(LENGTHS, sides, SUPERVISED)
    expected = run(config, train, sides, chunks)
    assert sum(part.hardware for part in found.values()) == pytest.approx(expected, rel=0.01)


def config_of(**changes: Any) -> TokenFlexConfig:
    sizes: dict[str, Any] = {"vision_config": VISION, "text_config": TEXT, "image_token_id": IMAGE}
    return TokenFlexConfig(**sizes, **changes)


def test_the_model_needs_half_of_the_pairs_and_no_recomputation() -> None:
    plain = PackCost(config_of(), settings(), 1).pack([100, 20], [4], 10)
    again = PackCost(config_of(), settings(**CHECKPOINTED), 5).pack([100, 20], [4], 10)
    full = PackCost(config_of(), settings(), 1, masked=True).pack([100, 20], [4], 10)
    assert all(plain[part].model == again[part].model for part in plain)
    assert all(plain[part].extra < again[part].extra for part in ("vision", "decoder", "loss"))
    hidden = 100 * 99 / 2 + 20 * 19 / 2  # pairs
    per_pair = 3 * 3 * 4 * 64  # layers; forward, backward twice that; two products of width 64
    assert full["decoder"].model - plain["decoder"].model == hidden * per_pair


def test_a_blank_tile_is_no_work_of_the_model() -> None:
    parts = PackCost(config_of(), settings(), 1).pack([100], [], 10)
    assert parts["vision"].model == parts["projector"].model == 0
    assert parts["vision"].extra > 0


def test_no_peak_is_known_of_a_cpu_or_an_unknown_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    names: dict[str, float | None] = {
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA L40S": 362e12,
    }
    names |= {"AMD Instinct MI300X OAM": 1307e12, "NVIDIA B200": 2250e12, "NVIDIA L40": None}
    names |= {"NVIDIA GeForce GTX 1080": None, "NVIDIA H100 80GB HBM3 MIG 3g.40gb": None}
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(gpu, "bf16") == peak, name
        assert peak_flops(gpu, "fp32") is None
    assert peak_flops(torch.device("cpu"), "bf16") is None


def test_the_slowest_rank_is_that_of_the_window() -> None:
    times = RankTimes(rank=1, world_size=3, window=2)
    assert times.row(2.5) == [0.0, 2.5, 0.0]
    times.extremes([9.0, 1.0, 1.0])
    times.extremes([1.0, 1.0, 3.0])
    found = times.extremes([1.0, 2.0, 4.0])  # the first step is out
    assert found == {
        "slowest_rank": 2,
        "slowest_rank_s": 3.5,
        "fastest_rank": 0,
        "fastest_rank_s": 1.0,
    }
