"""Optimizers by name under ZeRO-3: Muon against float64, saved, resumed, resharded, refused."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.errors import InputError
from tests.ranks import RankPool
from tests.training import elastic_scenarios, optimizer_scenarios, test_flops
from tests.training.elastic_scenarios import FP32, SAVED
from tests.training.scenarios import tiny_config
from tests.training.test_elastic import assert_resumed
from training.adapters import add_adapters
from training.config import TrainSettings
from training.model import PackedTokenFlex
from training.optimizers.orthogonal import muon_direction, orthogonal
from training.parameters import freeze, parameter_groups
from training.zero3.optimizers import check_optimizer

SHAPES = [(6, 6), (12, 5), (5, 12), (1, 7)]
MUON = [
    *FP32,
    "train.optimizer.name=muon",
    "train.modules.vision_model={train: true, lr: 1.0e-3, layer_decay: 0.5}",
]
STEP = f"step-{SAVED:08d}"


@pytest.mark.parametrize("shape", SHAPES)
def test_a_direction_is_that_of_its_singular_values(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    found = muon_direction(matrix, torch.float32)
    torch.testing.assert_close(
        found.double(), optimizer_scenarios.of_float64(matrix), rtol=1e-4, atol=1e-5
    )
    coarse = muon_direction(matrix, torch.bfloat16)
    assert coarse.dtype == torch.float32
    assert (coarse - found).norm() < 0.2 * found.norm()  # square: tiny singular values round
    assert not orthogonal(torch.zeros(shape)).any()


@pytest.mark.parametrize(
    ("name", "offload"), [("muon", "none"), ("muon", "cpu"), ("fused_adamw", "none")]
)
@pytest.mark.multiprocess
def test_two_ranks_take_the_steps_of_whole_parameters(
    two_ranks: RankPool, digits_corpus: Path, name: str, offload: str
) -> None:
    """After two steps every parameter is that of the papers' formulas in float64."""
    settings = [
        *MUON,
        f"train.optimizer.name={name}",
        "train.weight_decay=0.1",
        f"deepspeed.offload_optimizer={offload}",
    ]
    for found in two_ranks.run(optimizer_scenarios.two_steps, digits_corpus, settings):
        assert (found["matrices"] > 10) == (name == "muon") and found["others"] > 10
        assert max(found["errors"].values()) < 1e-4, found["errors"]


@pytest.mark.multiprocess
def test_muon_and_rates_by_layer_resume_bitwise_and_on_another_number_of_ranks(
    one_rank: RankPool, two_ranks: RankPool, digits_corpus: Path, tmp_path: Path
) -> None:
    saved = two_ranks.run(elastic_scenarios.save, digits_corpus, tmp_path, MUON)
    state = saved[0]["state"]
    groups = {state[f"group {n} name"]: n for n in range(len(state)) if f"group {n} name" in state}
    assert {"vision_model.0.decay", "vision_model.1.muon", "language_model.muon"} <= groups.keys()
    peaks = [
        state[f"group {groups[f'vision_model.{depth}.no_decay']} peak_lr"] for depth in (0, 1, 2)
    ]
    assert peaks == pytest.approx([2.5e-4, 5e-4, 1e-3])
    moments = {key for key in state if key.startswith("exp_avg_sq ")}
    assert "exp_avg_sq language_model.model.layers.0.mlp.up_proj.weight" not in moments
    assert "exp_avg_sq language_model.model.embed_tokens.weight" in moments
    again = two_ranks.run(optimizer_scenarios.resume, digits_corpus, tmp_path / STEP, MUON)
    assert_resumed(again, saved)
    assert [result["rows"] for result in again] == [result["rows"] for result in saved]
    assert_resumed(
        one_rank.run(elastic_scenarios.resume, digits_corpus, tmp_path / STEP, MUON), saved
    )


def test_muon_gets_the_matrices_inside_of_layers() -> None:
    train = TrainSettings(
        steps=1,
        optimizer={"name": "muon", "momentum": 0.9},
        weight_decay=0.1,
        modules={"vision_model": {"train": False}},
        adapters={"vision_model": {"r": 2}},
    )
    with torch.device("meta"):
        model: Any = PackedTokenFlex._from_config(test_flops.config_of())
        freeze(model, train.modules)
        add_adapters(model, train.adapters, seed=0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {group["name"]: group for group in parameter_groups(model, train)}
    found = {names[id(p)] for g in groups.values() if g.get("muon") for p in g["params"]}
    of_layers = {n for n in names.values() if re.fullmatch(r"language_model.*_proj\.weight", n)}
    assert found == of_layers | {f"projector.{leaf}" for leaf in ("w1", "w2", "w3")}
    others = {names[id(p)] for p in groups["language_model.decay"]["params"]}
    assert {name.split(".")[-2] for name in others} == {"embed_tokens", "lm_head"}
    assert groups["language_model.muon"]["momentum"] == 0.9
    assert groups["language_model.muon"]["weight_decay"] == 0.1
    assert {name for name in groups if "vision" in name} == {"vision_model.adapters.decay"}


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        ({"name": "adamw_8bit"}, r"adamw_8bit .*muon.*offload_optimizer=cpu"),
        ({"name": "lion"}, r"'adamw', 'fused_adamw' or 'muon'"),
        ({"momentum": 0.5}, r"momentum=0\.5 is of muon.*train\.betas"),
    ],
)
def test_what_is_not_there_is_refused_by_name(optimizer: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TrainSettings(steps=1, optimizer=optimizer)


def test_muon_is_not_offloaded_in_part(digits_corpus: Path) -> None:
    extra = "deepspeed.extra={zero_optimization: {offload_optimizer: {ratio: 0.5}}}"
    offload = ["deepspeed.offload_optimizer=cpu", extra]
    check_optimizer(tiny_config(digits_corpus, *offload))
    with pytest.raises(InputError, match=r"optimizer\.name=muon .*ratio=0\.5.* or take adamw"):
        check_optimizer(tiny_config(digits_corpus, "train.optimizer.name=muon", *offload))
