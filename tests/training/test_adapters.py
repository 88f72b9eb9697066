"""LoRA adapters in one process: which layers, what they compute, what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data_pipeline.errors import InputError
from tests.training import test_flops
from training.adapters import (
    StageAdapters,
    adapted_layers,
    add_adapters,
    merged,
    piece_of,
    plain_name,
)
from training.config import LAYERED, TrainSettings, load_config
from training.export.adapter_folder import check_adapters
from training.model import PackedTokenFlex
from training.parameters import freeze, module_table, parameter_groups, recompute_activations

DIGITS = "training/configs/digits.yaml"
FROZEN = {name: {"train": False} for name in ("vision_model", "projector", "language_model")}
RANKED: dict[str, Any] = {"r": 3, "alpha": 5}
KINDS: list[dict[str, Any]] = [{}, {"use_rslora": True}, {"use_dora": True}]


def settings(train: dict[str, Any] | None = None, **adapters: Any) -> TrainSettings:
    return TrainSettings(
        steps=1, modules={**FROZEN, **(train or {})}, adapters=adapters, weight_decay=0.1
    )


def adapted(train: TrainSettings, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = PackedTokenFlex._from_config(test_flops.config_of(), dtype=dtype)
    freeze(model, train.modules)
    add_adapters(model, train.adapters, seed=7)
    return model.train()


def as_if_trained(model: nn.Module) -> None:
    """Adapters that change what they lie beside."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if piece_of(name):
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter += 0.1 * noise.to(parameter.dtype)


def merged_state(model: nn.Module, adapters: StageAdapters) -> dict[str, Tensor]:
    """The parameters of a model without adapters that computes the same."""
    found = dict(model.named_parameters())
    small: dict[str, dict[str, Tensor]] = {}
    for name, value in found.items():
        if piece := piece_of(name):
            small.setdefault(piece[0], {})[piece[1]] = value.detach()
    state = {plain_name(n): v.detach() for n, v in found.items() if not piece_of(n)}
    for name, pieces in small.items():
        state[name] = merged(state[name], pieces, adapters.given[name.partition(".")[0]])
    return state


@pytest.mark.parametrize("kind", KINDS, ids=["LoRA", "rsLoRA", "DoRA"])
def test_a_model_with_adapters_is_that_of_the_merged_weights(kind: dict[str, Any]) -> None:
    beside = {"vision_model": RANKED | kind, "language_model": RANKED | kind}
    beside["projector"] = RANKED | {k: v for k, v in kind.items() if k != "use_dora"}
    train = settings(**beside)
    model = adapted(train).double()
    inputs = test_flops.pack([8, 2, 3])
    plain = PackedTokenFlex._from_config(test_flops.config_of(), dtype=torch.float64)
    plain.load_state_dict(merged_state(model, train.adapters))
    before = model(**inputs).loss
    torch.testing.assert_close(before, plain(**inputs).loss, rtol=1e-6, atol=0)
    as_if_trained(model)
    after = model(**inputs).loss
    assert (after - before).abs() > 1e-3 * before
    plain.load_state_dict(merged_state(model, train.adapters))
    torch.testing.assert_close(after, plain(**inputs).loss, rtol=1e-6, atol=0)


def test_a_merged_matrix_is_the_sum_of_the_paper() -> None:
    """Against float64; DoRA's rows have the lengths that train."""
    generator = torch.Generator().manual_seed(0)
    w, a, b = (torch.randn(s, generator=generator) for s in ((6, 5), (3, 5), (6, 3)))
    length = torch.rand(6, generator=generator)
    pieces = {"lora_A": a, "lora_B": b}
    wide = w.double() + 5 / 3 * b.double() @ a.double()
    for kind, scale in (({}, 5 / 3), ({"use_rslora": True}, 5 / 3**0.5)):
        adapter = StageAdapters(language_model=RANKED | kind).given["language_model"]
        expected = w.double() + scale * b.double() @ a.double()
        found = merged(w, pieces, adapter).double()
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    adapter = StageAdapters(language_model=RANKED | {"use_dora": True}).given["language_model"]
    expected = length[:, None].double() * wide / wide.norm(dim=1, keepdim=True)
    found = merged(w, {**pieces, "lora_magnitude_vector": length}, adapter)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_adapters_train_and_all_of_them(checkpointing: bool) -> None:
    train = settings(vision_model=RANKED, projector=RANKED, language_model=RANKED)
    model = adapted(train)
    if checkpointing:
        recompute_activations(model, LAYERED)
    as_if_trained(model)
    model(**test_flops.pack([4, 2])).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == bool(piece_of(name)), name
        assert (parameter.grad is not None and bool(parameter.grad.any())) == bool(piece_of(name))


def test_adapters_have_groups_and_a_line_of_their_own() -> None:
    rows = {"train": "new_tokens", "lr": 3e-5}
    train = settings(
        {"language_model": rows}, language_model=RANKED | {"lr": 2e-4, "use_dora": True}
    )
    model = adapted(train)
    groups = {group["name"]: group for group in parameter_groups(model, train)}
    assert {n: (g["peak_lr"], g["weight_decay"]) for n, g in groups.items()} == {
        "language_model.adapters.decay": (2e-4, 0.1),
        "language_model.adapters.no_decay": (2e-4, 0.0),
    }
    count = 3 * 7  # layers of as many matrices
    assert len(groups["language_model.adapters.decay"]["params"]) == 2 * count
    assert len(groups["language_model.adapters.no_decay"]["params"]) == count
    lines = {line.split()[0]: line.split()[1:] for line in module_table(model, train).splitlines()}
    assert lines["language_model"][1:3] == ["0", "frozen"]
    small = sum(p.numel() for g in groups.values() for p in g["params"])
    assert lines["language_model.adapters"][:3] == [f"{small:,}"] * 2 + ["2.0e-04"]


def test_values_are_those_of_the_seed_and_leave_the_random_state_alone() -> None:
    train = settings(projector=RANKED, language_model=RANKED | {"target_modules": ["q_proj"]})
    one, state = adapted(train), torch.get_rng_state()
    other = adapted(train)
    assert torch.equal(state, torch.get_rng_state())
    assert {name.rpartition(".")[2] for name, _ in adapted_layers(one)} == {"q_proj"}
    for (name, value), again in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(value, again), name


def test_dropout_is_of_training_only() -> None:
    model = adapted(settings(language_model=RANKED | {"dropout": 0.5}))
    as_if_trained(model)
    inputs = test_flops.pack([4])
    with torch.no_grad():
        training = [model(**inputs).loss.item() for _ in range(2)]
        model.eval()
        still = [model(**inputs).loss.item() for _ in range(2)]
    assert training[0] != training[1] and still[0] == still[1]


@pytest.mark.parametrize(
    ("part", "asked", "expected"),
    [
        ("language_model", ["query"], r"language_model\.target_modules names query.*q_proj"),
        ("language_model", ["lm_head"], r"names lm_head.*new_tokens"),
        ("language_model", ["embed_tokens"], r"names model\.embed_tokens.*new_tokens"),
        ("vision_model", ["layer_norm1"], r"layer_norm1, a LayerNorm.*Linear"),
    ],
)
def test_layers_that_have_no_adapter_are_named(part: str, asked: list[str], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        adapted(settings(**{part: RANKED | {"target_modules": asked}}))


def test_what_is_no_one_adapter_of_peft_is_named() -> None:
    run = Path("runs/lora")
    check_adapters(StageAdapters(vision_model={"r": 2}, language_model={"r": 3}), run)
    with pytest.raises(InputError, match=r"no adapters of vision_model or language_model"):
        check_adapters(StageAdapters(projector=RANKED), run)
    mixed = StageAdapters(vision_model=RANKED, language_model=RANKED | {"use_dora": True})
    with pytest.raises(InputError, match=r"with and without use_dora.*leave --adapter out"):
        check_adapters(mixed, run)


def test_without_peft_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(InputError, match=r"train\.adapters needs PEFT.*pip install peft"):
        adapted(settings(language_model=RANKED))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "language_model={r: 4}",
            r"train\.adapters\.language_model: .*language_model\.train=false",
        ),
        ("language_model={alpha: 4}", r"language_model\.r: is required"),
        ("language_model={r: 0}", r"language_model\.r: .*greater than 0"),
        ("language_model={r: 4, rank: 4}", r"language_model\.rank: unknown key"),
        (
            "language_model={r: 4, target_modules: q_proj}",
            r"target_modules: expected all-linear or",
        ),
        ("language_model={r: 4, target_modules: []}", r"target_modules: expected all-linear or"),
        ("language_model={r: 4, use_dora: true, dropout: 0.1}", r"use_dora with dropout=0\.1"),
        ("language_model={r: 4, load_in_4bit: true}", r"load_in_4bit: .*QLoRA.*offload_params=cpu"),
        ("projector={r: 4, target_modules: [w4]}", r"has w4: .*w1, w2, w3"),
        ("projector={r: 4, use_dora: true}", r"use_dora is not possible beside the projector"),
        ("projector={r: 4, dropout: 0.1}", r"dropout is not possible beside the projector"),
        ("head={r: 4}", r"train\.adapters\.head: unknown key"),
    ],
)
def test_settings_that_cannot_work_are_named(override: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        load_config(DIGITS, [f"train.adapters.{override}"])


def test_the_saved_settings_are_the_same_again(tmp_path: Path) -> None:
    from training.config import save_config

    overrides = ["train.adapters.language_model={r: 4, target_modules: [q_proj, v_proj]}"]
    config = load_config(DIGITS, [*overrides, "train.modules.language_model.train=new_tokens"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
