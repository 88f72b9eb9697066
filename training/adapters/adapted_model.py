"""Adapters are put into a model: PEFT's layers into the tower and the language model."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from data_pipeline.errors import InputError
from training.adapters.adapter_names import ADAPTER
from training.adapters.adapter_settings import (
    ALL_LINEAR,
    AdapterSettings,
    ProjectorAdapterSettings,
    StageAdapters,
)
from training.adapters.projector_adapter import adapt_projector


def add_adapters(model: nn.Module, adapters: StageAdapters, seed: int) -> None:
    """Put adapters into the frozen parts that the settings name.

    They train, and change nothing yet. Their values depend on the seed only, and are the same on
    all ranks.

    Raises:
        InputError: if PEFT is not installed, or a part has no such layers.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for part, settings in adapters.given.items():
            module = getattr(model, part)
            if isinstance(settings, ProjectorAdapterSettings):
                adapt_projector(module, settings)
            else:
                _adapt_layers(module, settings, f"train.adapters.{part}")


def lora_config(settings: AdapterSettings, target_modules: str | list[str]) -> Any:
    """The settings as PEFT has them; InputError without PEFT."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise InputError(
            f"train.adapters needs PEFT, which cannot be imported ({error}); run make setup, or "
            "pip install peft"
        ) from error
    return LoraConfig(
        r=settings.r,
        lora_alpha=settings.r if settings.alpha is None else settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=target_modules,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
    )


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, layer of PEFT) of every layer that has an adapter."""
    for name, module in model.named_modules():
        if hasattr(module, "base_layer") and ADAPTER in getattr(module, "lora_A", ()):
            yield name, module


def _adapt_layers(part: nn.Module, settings: AdapterSettings, key: str) -> None:
    named = settings.target_modules
    config = lora_config(settings, named)
    from peft import inject_adapter_in_model

    if isinstance(named, list):
        _check_targets(part, named, key)
    is_meta = next(part.parameters()).device.type == "meta"
    with _where_they_are_made():
        inject_adapter_in_model(config, part, ADAPTER, low_cpu_mem_usage=is_meta)
    for name, layer in adapted_layers(part):
        if not _is_linear(layer.base_layer):
            kind = type(layer.base_layer).__name__
            raise InputError(
                f"{key}: {name} is a {kind}, and adapters are for Linear layers; name these in its "
                "target_modules"
            )
        _move(layer)


@contextmanager
def _where_they_are_made() -> Iterator[None]:
    """PEFT leaves adapters on the CPU, in fp32: it moves modules, which estimates cannot."""
    own = nn.Module.to
    nn.Module.to = lambda module, *_, **__: module  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.to = own  # type: ignore[method-assign]


def _move(layer: Any) -> None:
    """Put an adapter where its frozen matrix is, and as that is."""
    base = layer.base_layer.weight
    for pieces in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
        for small in pieces.values():
            small.weight = nn.Parameter(small.weight.detach().to(base.device, base.dtype))


def _check_targets(part: nn.Module, named: list[str], key: str) -> None:
    """InputError where a name is of no layer, or of one that has no adapter here."""
    found = defaultdict(list)
    for name, module in part.named_modules():
        for target in named:
            if name == target or name.endswith(f".{target}"):
                found[target].append((name, module))
    if missing := [target for target in named if target not in found]:
        leaves = {name.rpartition(".")[2] for name, m in part.named_modules() if _is_linear(m)}
        raise InputError(
            f"{key}.target_modules names {', '.join(missing)}, which is no layer there; give some "
            f"of {', '.join(sorted(leaves))}, or {ALL_LINEAR}"
        )
    head = getattr(part, "get_output_embeddings", lambda: None)()
    for layers in found.values():
        for name, module in layers:
            if module is head or isinstance(module, nn.Embedding):
                raise InputError(
                    f"{key}.target_modules names {name}: embedding and head have no adapters here; "
                    "train.modules.language_model.train=new_tokens trains the rows of new tokens"
                )
            if not _is_linear(module):
                raise InputError(
                    f"{key}.target_modules names {name}, a {type(module).__name__}: adapters are "
                    f"for Linear layers; name these, or {ALL_LINEAR}"
                )


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)
