"""Which modules train and how fast: freezing, parameter groups, and the table shown at start."""

import math
from collections.abc import Callable, Iterator

from torch import nn

from data_pipeline.text_table import text_table
from training.config import ModuleSettings, StageModules, TrainSettings

Shape = Callable[[nn.Parameter], tuple[int, ...]]
"""Gives a parameter's shape as a whole, however an engine has partitioned it."""


def _own_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(parameter.shape)


def parts(
    model: nn.Module, modules: StageModules
) -> Iterator[tuple[str, nn.Module, ModuleSettings]]:
    """Yield (name, submodule, settings) for the vision tower, projector and language model."""
    for name, settings in modules:
        yield name, getattr(model, name), settings


def freeze(model: nn.Module, modules: StageModules) -> None:
    """Set `requires_grad` of every parameter to what the stage says."""
    for _, module, settings in parts(model, modules):
        module.requires_grad_(settings.train)


def parameter_groups(
    model: nn.Module, train: TrainSettings, shape: Shape = _own_shape
) -> list[dict]:
    """AdamW groups of the trainable parameters: per module, with and without weight decay.

    Norms and biases (fewer than two dimensions) are not decayed. `peak_lr` is what the schedule
    scales; the groups' order is fixed, so that checkpoints match.
    """
    groups = []
    for name, module, settings in parts(model, train.modules):
        trainable = [p for p in module.parameters() if p.requires_grad]
        for suffix, decay, chosen in (
            ("decay", train.weight_decay, [p for p in trainable if len(shape(p)) >= 2]),
            ("no_decay", 0.0, [p for p in trainable if len(shape(p)) < 2]),
        ):
            if chosen:
                groups.append(
                    {
                        "params": chosen,
                        "name": f"{name}.{suffix}",
                        "lr": settings.lr,
                        "peak_lr": settings.lr,
                        "weight_decay": decay,
                    }
                )
    return groups


def learning_rate_factor(step: int, train: TrainSettings) -> float:
    """Factor on every peak learning rate at 0-based `step`: linear warm-up, then cosine decay."""
    warmup = math.ceil(train.warmup_fraction * train.steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, train.steps - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return train.min_lr_fraction + (1 - train.min_lr_fraction) * cosine


def module_table(model: nn.Module, modules: StageModules, shape: Shape = _own_shape) -> str:
    """A table of module, parameters, trainable parameters, peak learning rate and dtype."""
    rows = [("module", "parameters", "trainable", "peak lr", "dtype")]
    for name, module, settings in parts(model, modules):
        parameters = list(module.parameters())
        trainable = sum(math.prod(shape(p)) for p in parameters if p.requires_grad)
        dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in parameters})
        lr = f"{settings.lr:.1e}" if settings.train else "frozen"
        total = sum(math.prod(shape(p)) for p in parameters)
        rows.append((name, f"{total:,}", f"{trainable:,}", lr, ", ".join(dtypes)))
    return text_table(rows, left=(0, 4))
