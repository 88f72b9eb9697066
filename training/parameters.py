"""Which modules train and how fast: freezing, parameter groups, and the table shown at start."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from data_pipeline.text_table import text_table
from training.adapters import piece_of
from training.config import LAYERED, ModuleSettings, StageModules, TrainSettings
from training.optimizers import hidden_matrices, layer_depths

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
    """Set `requires_grad` of every parameter to what the stage says.

    Rows of new tokens come after that: see `training.model.new_rows`.
    """
    for _, module, settings in parts(model, modules):
        module.requires_grad_(settings.trains_whole)


def recompute_activations(model: Any, modules: Sequence[str]) -> None:
    """Let the layers of these modules keep their inputs only, and compute the rest again.

    The others keep all. transformers makes the embeddings' outputs require gradients with that, for
    adapters: a frozen tower would be computed again and run backward, for gradients that nothing
    reads.
    """
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()
    for name in set(LAYERED).difference(modules):
        for module in getattr(model, name).modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False


def parameter_groups(
    model: nn.Module, train: TrainSettings, shape: Shape = _own_shape
) -> list[dict]:
    """Groups of the trainable parameters: per module, with and without weight decay.

    With Muon its matrices come first, in groups with `muon` and its momentum. A tower with
    `layer_decay` has groups of their own for every depth. Those of a module's adapters follow its
    own. Norms and biases (fewer than two dimensions) are not decayed. `peak_lr` is what the
    schedule scales; the groups' order is fixed, so that checkpoints match.
    """
    groups = []
    muon = train.optimizer.name == "muon"
    matrices = hidden_matrices(model) if muon else set()
    own = {"muon": True, "momentum": train.optimizer.momentum}
    for name, lr, parameters in _decayed(model, train):
        trainable = [p for p in parameters if p.requires_grad]
        others = [p for p in trainable if id(p) not in matrices]
        for suffix, decay, chosen in (
            ("muon", train.weight_decay, [p for p in trainable if id(p) in matrices]),
            ("decay", train.weight_decay, [p for p in others if len(shape(p)) >= 2]),
            ("no_decay", 0.0, [p for p in others if len(shape(p)) < 2]),
        ):
            if chosen:
                groups.append(
                    {
                        "params": chosen,
                        "name": f"{name}.{suffix}",
                        "lr": lr,
                        "peak_lr": lr,
                        "weight_decay": decay,
                        **(own if suffix == "muon" else {}),
                    }
                )
    return groups


def _rates(
    model: nn.Module, train: TrainSettings
) -> Iterator[tuple[str, float, list[nn.Parameter]]]:
    """(name, peak learning rate, parameters) of every module, and of its adapters behind it."""
    for name, module, settings in parts(model, train.modules):
        own, small = split_adapters(module)
        yield name, settings.lr, own
        if small:
            yield f"{name}.adapters", train.adapters.given[name].lr, small


def _decayed(
    model: nn.Module, train: TrainSettings
) -> Iterator[tuple[str, float, list[nn.Parameter]]]:
    """As `_rates`, the tower by depth where its layers have rates of their own."""
    decay = train.modules.vision_model.layer_decay
    for name, lr, parameters in _rates(model, train):
        if name != "vision_model" or decay == 1:
            yield name, lr, parameters
            continue
        depths, last = layer_depths(model.get_submodule(name))
        for depth in range(last + 1):
            chosen = [p for p in parameters if depths[id(p)] == depth]
            yield f"{name}.{depth}", lr * decay ** (last - depth), chosen


def split_adapters(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """A module's own parameters, and those of its adapters."""
    own: list[nn.Parameter] = []
    small: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        (small if piece_of(name) else own).append(parameter)
    return own, small


@dataclass(frozen=True)
class Schedule:
    """The factor on every peak learning rate: linear warm-up, then a decay to a fraction.

    schedule: along a cosine, a line, or (wsd) a line in the last `decay_fraction` of the steps.

    A run that was changed on its way keeps the schedule `before`. Then `how` says what follows:
    `constant` holds the last factor of it once it has ended; `decay` leaves it after `start` steps,
    for a warm-up from the factor reached there and a decay over what is left.
    """

    steps: int
    warmup_fraction: float
    min_lr_fraction: float
    how: Literal["whole", "constant", "decay"] = "whole"
    start: int = 0
    before: "Schedule | None" = None
    schedule: str = "cosine"
    decay_fraction: float = 0.1

    @classmethod
    def of(cls, train: TrainSettings) -> "Schedule":
        """That of a run from its beginning."""
        return cls(
            train.steps,
            train.warmup_fraction,
            train.min_lr_fraction,
            schedule=train.schedule,
            decay_fraction=train.decay_fraction,
        )

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Schedule":
        """The inverse of `dataclasses.asdict`."""
        before = fields["before"]
        return cls(**{**fields, "before": cls.from_dict(before) if before else None})

    def changed(self, train: TrainSettings, how: str, start: int) -> "Schedule":
        """What follows after `start` steps of this one where the settings have become others."""
        whole = Schedule.of(train)
        if how == "stretch":
            return whole
        return replace(
            whole, how="constant" if how == "constant" else "decay", start=start, before=self
        )

    def factor(self, step: int) -> float:
        """At 0-based `step`."""
        low = 0.0
        if self.before:
            if self.how == "constant":
                return self.before.factor(min(step, self.before.steps - 1))
            if step < self.start:
                return self.before.factor(step)
            low = self.before.factor(self.start - 1)
        step, steps = step - self.start, self.steps - self.start
        warmup = math.ceil(self.warmup_fraction * steps)
        if step < warmup:
            return low + (1 - low) * (step + 1) / warmup
        if self.schedule == "wsd":
            warmup = max(warmup, steps - math.ceil(self.decay_fraction * steps))
        progress = min(1.0, max(0, step - warmup) / max(1, steps - warmup))
        if self.schedule == "cosine":
            left = 0.5 * (1 + math.cos(math.pi * progress))
        else:
            left = 1 - progress
        return self.min_lr_fraction + (1 - self.min_lr_fraction) * left


def module_table(model: nn.Module, train: TrainSettings, shape: Shape = _own_shape) -> str:
    """A table of module, parameters, trainable parameters, peak learning rate and dtype."""
    rows = [("module", "parameters", "trainable", "peak lr", "dtype")]
    lowest: dict[str, float] = {}
    for name, lr, _ in _decayed(model, train):
        lowest.setdefault(name.removesuffix(".0"), lr)
    for name, lr, parameters in _rates(model, train):
        trainable = sum(math.prod(shape(p)) for p in parameters if p.requires_grad)
        dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in parameters})
        total = sum(math.prod(shape(p)) for p in parameters)
        rate = f"{lr:.1e}" if trainable else "frozen"
        if lowest[name] != lr:
            rate = f"{lowest[name]:.1e} to {rate}"
        rows.append((name, f"{total:,}", f"{trainable:,}", rate, ", ".join(dtypes)))
    return text_table(rows, left=(0, 4))
