"""Random inputs of the projector: what a call gets, and what its backward starts from."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.passes import Weights
from kernels.profile.baselines import Call
from kernels.profile.cases import Case

MAX_SETS = 256


@dataclass(frozen=True)
class Inputs:
    """One set of leaves: x [T, H*W, C], the weights, and the gradient of the result [M, D].

    Of another call than the projector x has its own shape, and weights is a namedtuple of its own.
    """

    x: Tensor
    weights: Any
    grad: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        """What gradients are taken of."""
        return [leaf for leaf in (self.x, *self.weights) if leaf.requires_grad]


def make_inputs(case: Case, device: torch.device, seed: int = 0, frozen: bool = False) -> Inputs:
    """Random inputs of unit variance at every step; frozen: x needs no gradient."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, std: float = 1.0, mean: float = 0.0, leaf: bool = True) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device) * std + mean
        return values.to(case.torch_dtype).requires_grad_(leaf)

    c, f, d = case.channels, case.hidden, case.width
    x = normal(case.tiles, case.patches, c, leaf=not frozen)
    weights = Weights(
        norm_weight=normal(c, std=0.1, mean=1.0),
        norm_bias=normal(c, std=0.1),
        w1=normal(f, c, std=c**-0.5),
        b1=normal(f, std=0.1),
        w2=normal(f, c, std=c**-0.5),
        b2=normal(f, std=0.1),
        w3=normal(d, f, std=f**-0.5),
        b3=normal(d, std=0.1),
    )
    return Inputs(x, weights, normal(case.rows, d, leaf=False))


def rotating_inputs(case: Case, device: torch.device, frozen: bool = False) -> list[Inputs]:
    """Sets enough that together they are more than 3x the L2 cache, so that none is left in it."""
    first = make_inputs(case, device, 0, frozen)
    count = sets_past_l2(sum(t.nbytes for t in (first.x, *first.weights, first.grad)), device)
    return [first, *(make_inputs(case, device, seed, frozen) for seed in range(1, count))]


def sets_past_l2(size: int, device: torch.device) -> int:
    """How many sets of `size` bytes, two at least, are together more than 3x the L2 cache."""
    return min(MAX_SETS, max(2, math.floor(3 * l2_bytes(device) / size) + 1))


def l2_bytes(device: torch.device) -> int:
    """Size of the L2 cache; 128 MiB, more than any GPU of today, where torch does not say."""
    if device.type != "cuda":
        return 0
    return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 128 * 2**20


def backward(inputs: Inputs, out: Tensor) -> tuple[Tensor, ...]:
    """Gradients of the leaves, without adding to any `.grad`; none where nothing needs one."""
    if not inputs.leaves:
        return ()
    return torch.autograd.grad(out, inputs.leaves, inputs.grad)


def outputs_and_gradients(call: Call, inputs: Inputs) -> dict[str, Tensor]:
    """The result as "out", and the gradients by the names of what they are of."""
    out = call(inputs.x, inputs.weights)
    leaves = (inputs.x, *inputs.weights)
    of = ("x", *inputs.weights._fields)
    names = [name for name, leaf in zip(of, leaves, strict=True) if leaf.requires_grad]
    gradients = backward(inputs, out)
    return {"out": out.detach(), **dict(zip(names, gradients, strict=True))}
