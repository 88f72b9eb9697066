"""This op's steps as a CUDA graph: what a call would take if the host cost nothing.

The registered op makes the batch's layout on the host in every call and so cannot be captured. Here
the layout is an argument of the steps, made once: fit for a benchmark of one fixed batch only.
"""

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import implementation
from kernels.passes import Needs, Saved, Weights, backward, forward
from kernels.profile.baselines import EPS, Call
from kernels.profile.cases import Case
from kernels.tile_layout import TileLayout


class _Steps(torch.autograd.Function):
    """`kernels.passes` on a layout that is given."""

    @staticmethod
    def forward(
        ctx: Any, do: ModuleType, layout: TileLayout, x: Tensor, *weights: Tensor
    ) -> Tensor:
        out, saved = forward(do, x, layout, Weights(*weights), "save", False, EPS)
        ctx.save_for_backward(*saved, *weights)
        ctx.do, ctx.layout = do, layout
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors, needs = ctx.saved_tensors, Needs(ctx.needs_input_grad[2], True, True, True)
        saved, weights = Saved(*tensors[:5]), Weights(*tensors[5:])
        return None, None, *backward(ctx.do, grad, ctx.layout, weights, saved, needs, False)


def with_layout(case: Case, device: torch.device) -> Callable[..., Tensor]:
    """The op's steps as a function of (x, *weights), all of the layout in it already."""
    do = import_module(f"kernels.{implementation('auto', device, case.torch_dtype)}_impl")
    layout = case.layout(device)
    return lambda x, *weights: _Steps.apply(do, layout, x.flatten(0, 1), *weights)


def replayed(case: Case, device: torch.device) -> Call:
    """A graph of forward and one of backward per set of inputs, captured in its first call.

    Only the gradient is copied, to where the graph reads it. What autograd would keep is in the
    graph's own memory, so that none of it is counted.
    """
    steps, graphs = with_layout(case, device), dict[int, Any]()

    def call(x: Tensor, w: Weights) -> Tensor:
        if x.data_ptr() not in graphs:
            graphs[x.data_ptr()] = torch.cuda.make_graphed_callables(steps, (x, *w))
        return graphs[x.data_ptr()](x, *w)

    return call
