"""One large part of a step: a module of the trainer at the shapes of one pack, and its work."""

import copy
import math
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kernels.profile.baselines import Call
from kernels.profile.random_inputs import Inputs, sets_past_l2
from training.model.build import DTYPES

Build = Callable[[nn.Module, torch.device], Call]  # of a module with weights


@dataclass(frozen=True, eq=False)
class StepPart:
    """One part of a step.

    times: how often it runs in a forward. module: its weights, on the meta device. x, out: shapes.
    x_grad, trains: whether its input and its weights need gradients. products: weights of matrix
    products times positions. attention: FLOPs of attention forward, the pairs that are masked
    left out. norm_first: whether a norm of its own, which trains with it, stands before its
    products. again: whether activation checkpointing runs it forward once more. ours, liger: how
    it is called.
    """

    name: str
    about: str
    dtype: str
    times: int
    module: nn.Module
    x: tuple[int, ...]
    out: tuple[int, ...]
    ours: Build
    liger: Build | None = None
    x_grad: bool = True
    trains: bool = True
    products: float = 0.0
    attention: float = 0.0
    again: bool = False
    norm_first: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of x and the weights."""
        return DTYPES[self.dtype]

    @property
    def modes(self) -> tuple[str, ...]:
        """What the step runs of it: no backward where nothing in or below it trains."""
        return ("forward", "both") if self.x_grad or self.trains else ("forward",)

    def flops(self, mode: str) -> float:
        """Of the matrix products and attention that the result needs."""
        forward = 2.0 * self.products + self.attention
        below = self.x_grad or (self.norm_first and self.trains)
        backward = 2.0 * self.products * (below + self.trains) + 2 * self.attention
        return forward if mode == "forward" else forward + backward

    def bytes(self, mode: str) -> float:
        """Bytes that must be moved: every input read once, every result written once."""
        weights = sum(p.numel() for p in self.module.parameters())
        x, out = math.prod(self.x), math.prod(self.out)
        forward = x + weights + out
        backward = x + out + self.x_grad * (weights + x) + self.trains * weights
        return self.torch_dtype.itemsize * (forward + (backward if mode == "both" else 0))

    def record(self) -> dict[str, Any]:
        """What tables are made of, for the file."""
        return {
            **{"about": self.about, "times": self.times, "dtype": self.dtype, "again": self.again},
            "flops": {mode: self.flops(mode) for mode in self.modes},
            "bytes": {mode: self.bytes(mode) for mode in self.modes},
        }

    def build(self, device: torch.device) -> nn.Module:
        """The module with random weights on a device."""
        module = copy.deepcopy(self.module).to_empty(device=device).requires_grad_(self.trains)
        with torch.no_grad():
            for weight in module.parameters():
                nn.init.normal_(weight, std=0.02) if weight.ndim > 1 else nn.init.ones_(weight)
        return module

    def inputs(self, module: nn.Module, device: torch.device) -> list[Inputs]:
        """Random inputs, more than the L2 cache holds; the weights are the module's, in all."""
        named = dict(module.named_parameters())
        names: Any = [name.replace(".", "_") for name in named]
        weights = namedtuple("weights", names)(*named.values())
        options: dict[str, Any] = {"device": device, "dtype": self.torch_dtype}
        moved = (math.prod(self.x) + math.prod(self.out)) * self.torch_dtype.itemsize
        return [
            Inputs(
                torch.randn(self.x, **options).requires_grad_(self.x_grad),
                weights,
                torch.randn(self.out, **options) if self.out else torch.ones((), device=device),
            )
            for _ in range(sets_past_l2(moved, device))
        ]
