"""Freezing, parameter groups, the learning-rate schedule."""

import math

import pytest
import torch
from torch import nn

from training.config import LanguageModelSettings, ModuleSettings, StageModules, TrainSettings
from training.parameters import Schedule, freeze, module_table, parameter_groups


class Tiny(nn.Module):
    """Stands for the model: the three parts, each a Linear with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.vision_model = nn.Linear(2, 3)
        self.projector = nn.Linear(3, 4)
        self.language_model = nn.Linear(4, 5)


def settings(**modules: ModuleSettings) -> TrainSettings:
    return TrainSettings(steps=100, weight_decay=0.1, modules=StageModules(**modules))


def test_groups_hold_each_trainable_parameter_once_with_its_learning_rate() -> None:
    model = Tiny()
    train = settings(
        vision_model=ModuleSettings(train=False),
        projector=ModuleSettings(lr=1e-3),
        language_model=LanguageModelSettings(lr=2e-5),
    )
    freeze(model, train.modules)
    groups = parameter_groups(model, train)
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in groups] == [
        ("projector.decay", 1e-3, 0.1),
        ("projector.no_decay", 1e-3, 0.0),
        ("language_model.decay", 2e-5, 0.1),
        ("language_model.no_decay", 2e-5, 0.0),
    ]
    grouped = [id(p) for g in groups for p in g["params"]]
    expected = [*model.projector.parameters(), *model.language_model.parameters()]
    assert sorted(grouped) == sorted(id(p) for p in expected)


def test_freezing_is_undone_by_the_next_stage() -> None:
    model = Tiny()
    freeze(model, settings(vision_model=ModuleSettings(train=False)).modules)
    assert not model.vision_model.weight.requires_grad
    freeze(model, settings().modules)
    assert all(p.requires_grad for p in model.parameters())


def test_beside_rows_of_new_tokens_the_language_model_is_frozen() -> None:
    model = Tiny()
    train = settings(language_model=LanguageModelSettings(train="new_tokens", lr=2e-5))
    freeze(model, train.modules)
    assert not any(p.requires_grad for p in model.language_model.parameters())
    model.language_model.new_rows = nn.Linear(1, 1, bias=False)
    groups = {group["name"]: group for group in parameter_groups(model, train)}
    assert groups["language_model.decay"]["params"] == [model.language_model.new_rows.weight]
    assert "language_model.no_decay" not in groups
    assert module_table(model, train).splitlines()[3].split()[2:4] == ["1", "2.0e-05"]


def test_schedule_warms_up_linearly_and_decays_as_a_cosine() -> None:
    train = TrainSettings(steps=110, warmup_fraction=10 / 110, min_lr_fraction=0.1)
    schedule = Schedule.of(train)
    factors = [schedule.factor(step) for step in range(train.steps)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == pytest.approx(1.0)
    assert factors[60] == pytest.approx(0.1 + 0.9 * 0.5)  # half-way down
    assert factors[85] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(0.75 * math.pi)))
    assert min(factors[10:]) == factors[-1] > 0.1


def test_table_names_modules_sizes_rates_and_dtypes() -> None:
    model = Tiny().to(torch.bfloat16)
    train = settings(vision_model=ModuleSettings(train=False))
    freeze(model, train.modules)
    lines = module_table(model, train).splitlines()
    assert lines[1].split() == ["vision_model", "9", "0", "frozen", "bfloat16"]
    assert lines[2].split() == ["projector", "16", "16", "1.0e-05", "bfloat16"]
