"""Freezing, parameter groups, the learning-rate schedule."""

import math
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import nn

from training.config import (
    LanguageModelSettings,
    ModuleSettings,
    StageModules,
    TrainSettings,
    VisionModelSettings,
)
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
        vision_model=VisionModelSettings(train=False),
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
    freeze(model, settings(vision_model=VisionModelSettings(train=False)).modules)
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


def factors_of(**changes: Any) -> list[float]:
    schedule = Schedule.of(TrainSettings(steps=110, warmup_fraction=10 / 110, **changes))
    return [schedule.factor(step) for step in range(schedule.steps)]


def test_a_line_and_a_plateau_beside_the_cosine() -> None:
    cosine, line = factors_of(), factors_of(schedule="linear", min_lr_fraction=0.2)
    assert cosine == factors_of(schedule="cosine", decay_fraction=0.7)
    assert line[:11] == pytest.approx(cosine[:11])
    assert line[60] == pytest.approx(0.2 + 0.8 * 0.5) and line[-1] == pytest.approx(0.2 + 0.8 / 100)
    wsd = factors_of(schedule="wsd", decay_fraction=0.2, min_lr_fraction=0.2)  # its last 22 steps
    assert wsd[:10] == cosine[:10] and set(wsd[10:89]) == {1.0}
    assert wsd[88:] == pytest.approx([0.2 + 0.8 * (22 - step) / 22 for step in range(22)])
    with pytest.raises(ValueError, match=r"warmup_fraction .* decay_fraction .* lower one"):
        TrainSettings(steps=9, schedule="wsd", warmup_fraction=0.3, decay_fraction=0.8)


def test_a_run_of_a_plateau_is_made_longer_without_a_leap() -> None:
    train = TrainSettings(steps=100, schedule="wsd", warmup_fraction=0.1, decay_fraction=0.2)
    longer = train.model_copy(update={"steps": 200})
    saved = Schedule.of(train)
    stretched = saved.changed(longer, "stretch", 80)
    assert saved.factor(79) == stretched.factor(80) == stretched.factor(159) == 1.0
    assert stretched.factor(160) == 1.0 > stretched.factor(161)
    again = saved.changed(longer, "decay", 100)  # from its end: up again, a plateau, a decay
    assert [again.factor(step) for step in range(100)] == [saved.factor(s) for s in range(100)]
    assert again.factor(109) == pytest.approx(1.0) and again.factor(179) == 1.0
    assert again.factor(199) < 0.1
    assert Schedule.from_dict(asdict(again)) == again
    older = {k: v for k, v in asdict(saved).items() if k not in ("schedule", "decay_fraction")}
    assert Schedule.from_dict(older) == replace(saved, schedule="cosine", decay_fraction=0.1)


def test_table_names_modules_sizes_rates_and_dtypes() -> None:
    model = Tiny().to(torch.bfloat16)
    train = settings(vision_model=VisionModelSettings(train=False))
    freeze(model, train.modules)
    lines = module_table(model, train).splitlines()
    assert lines[1].split() == ["vision_model", "9", "0", "frozen", "bfloat16"]
    assert lines[2].split() == ["projector", "16", "16", "1.0e-05", "bfloat16"]
