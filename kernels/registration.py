"""The op as PyTorch sees it: two custom ops, their fake versions and the autograd formula.

`torch.library.custom_op`, not `triton_op`: what runs inside stays opaque to torch.compile, so the
kernels, their launch configurations and the host-side layout are the same with and without it.
The parameters themselves are saved for backward, never a copy, since ZeRO-3 frees and gathers them.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import lru_cache
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.dispatch import implementation, use_fused
from kernels.passes import Needs, Saved, Weights, backward, forward
from kernels.tile_layout import COLUMNS, TileLayout, shape_kinds, tile_layout


def steps(
    impl: str, gemm: str, kernel: str, rows: int, like: Tensor, **sizes: int
) -> tuple[ModuleType, bool]:
    """The module with the op's steps, PyTorch's or Triton's, and whether to use a fused GEMM."""
    runs = implementation(impl, like.device, like.dtype)
    fused = use_fused(kernel, gemm, runs, rows, like, **sizes)
    return import_module(f"kernels.{runs}_impl"), fused


class Options(NamedTuple):
    """What a call asks for besides its tensors.

    One string as an argument of the ops: the dispatcher's time per call grows with every argument.
    """

    pool: str
    keep: str  # "save", "recompute" or "none"
    impl: str
    gemm: str
    eps: float

    def encode(self) -> str:
        """As a string that `decode` reads."""
        return f"{self.pool} {self.keep} {self.impl} {self.gemm} {self.eps}"

    @staticmethod
    @lru_cache(maxsize=256)
    def decode(text: str) -> "Options":
        """The options that were encoded."""
        pool, keep, impl, gemm, eps = text.split()
        return Options(pool, keep, impl, gemm, float(eps))


# The layout is made on the host, anew in every call: nothing of it may be captured and replayed.
_TAGS = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op("tokenflex::projector_forward", mutates_args=(), tags=_TAGS)
def projector_forward(
    x: Tensor,
    shapes: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    options: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns (out [M, D], *`Saved`, `TileLayout.table`); x [P, C], shapes int [T, 4] on CPU.

    options: `Options.encode()`.
    """
    o = Options.decode(options)
    layout = tile_layout(shapes.numpy(), o.pool, x.device)
    if layout.patches != x.shape[0]:
        raise ValueError(
            f"x has {x.shape[0]} patches and the shapes {layout.patches}; pass the patches of all "
            "tiles, one tile after the other"
        )
    weights = Weights(norm_weight, norm_bias, w1, b1, w2, b2, w3, b3)
    if layout.rows == 0:
        return (*_empty_results(x, weights, 0, o.keep), layout.table)
    with _plain_numerics(x):
        sizes = {"C": x.shape[1], "F": w1.shape[0]}
        do, fused = steps(o.impl, o.gemm, "dual_gemm", layout.rows, x, **sizes)
        out, saved = forward(do, x.contiguous(), layout, weights, o.keep, fused, o.eps)
    return (out, *saved, layout.table)


@projector_forward.register_fake
def _(x, shapes, *rest):
    *weights, options = rest
    rows = torch.library.get_ctx().new_dynamic_size(min=0)
    table = x.new_empty(rows + COLUMNS * shapes.shape[0], dtype=torch.int32)
    return (*_empty_results(x, Weights(*weights), rows, Options.decode(options).keep), table)


def _empty_results(x: Tensor, w: Weights, rows: Any, keep: str) -> tuple[Any, ...]:
    """out and `Saved` for a number of rows, uninitialised."""
    statistic = torch.promote_types(x.dtype, torch.float32)
    gate_rows = rows if keep == "save" else 0
    return (
        x.new_empty(rows, w.w3.shape[0]),
        x.new_empty(rows if keep != "none" else 0, x.shape[1]),
        x.new_empty(rows, dtype=statistic),
        x.new_empty(rows, dtype=statistic),
        x.new_empty(gate_rows, w.w1.shape[0]),
        x.new_empty(gate_rows, w.w1.shape[0]),
    )


@torch.library.custom_op("tokenflex::projector_backward", mutates_args=(), tags=_TAGS)
def projector_backward(
    grad: Tensor,
    shapes: Tensor,
    table: Tensor,
    pooled: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gate: Tensor,
    value: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    options: str,
    needs: Sequence[bool],
    patches: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and the eight weights, in that order; empty where `Needs` does not ask."""
    weights = Weights(norm_weight, norm_bias, w1, b1, w2, b2, w3, b3)
    o = Options.decode(options)
    if grad.shape[0] == 0:
        empty = _empty_gradients(grad, patches, weights, Needs(*needs))
        return tuple(gradient.zero_() for gradient in empty)  # type: ignore[return-value]
    on_host = shapes.numpy()
    layout = TileLayout(on_host, o.pool, table, shape_kinds(on_host))
    saved, grad = Saved(pooled, mean, rstd, gate, value), grad.contiguous()
    with _plain_numerics(grad):
        sizes = {"D": w3.shape[0], "F": w3.shape[1]}
        do, fused = steps(o.impl, o.gemm, "gate_gemm", len(grad), grad, **sizes)
        found = backward(do, grad, layout, weights, saved, Needs(*needs), fused)
    return tuple(  # type: ignore[return-value]
        grad.new_empty(0) if gradient is None else gradient for gradient in found
    )


@projector_backward.register_fake
def _(grad, shapes, *rest):
    *_, needs, patches = rest
    return tuple(_empty_gradients(grad, patches, Weights(*rest[-11:-3]), Needs(*needs)))


def _empty_gradients(grad: Tensor, patches: int, w: Weights, needs: Needs) -> list[Tensor]:
    """The gradients' tensors, uninitialised; [0] where not asked for."""
    asked = [needs.norm] * 2 + [needs.gates] * 4 + [needs.out] * 2
    x_shape = (patches, w.w1.shape[1]) if needs.x else (0,)
    return [grad.new_empty(x_shape)] + [
        weight.new_empty(weight.shape if wanted else (0,))
        for weight, wanted in zip(w, asked, strict=True)
    ]


def _plain_numerics(tensor: Tensor) -> AbstractContextManager[Any]:
    """No autocast inside the op, and the tensor's GPU current: Triton launches on that one."""
    stack = ExitStack()
    stack.enter_context(torch.autocast(tensor.device.type, enabled=False))
    stack.enter_context(torch.cuda.device_of(tensor))
    return stack


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, shapes, *weights, options = inputs
    _, *saved, table = output
    ctx.mark_non_differentiable(*saved, table)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(shapes, table, *saved, *weights)
    ctx.options, ctx.patches = options, x.shape[0]


def _autograd(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    x, _, *weights = ctx.needs_input_grad[:10]
    nothing = (None,) * 11
    if grad is None:
        return nothing
    needs = Needs(x, any(weights[:2]), any(weights[2:6]), any(weights[6:]))
    found = projector_backward(grad, *ctx.saved_tensors, ctx.options, list(needs), ctx.patches)
    asked = (x, *weights)
    grad_x, *grad_weights = (
        gradient if wanted else None for gradient, wanted in zip(found, asked, strict=True)
    )
    return (grad_x, None, *grad_weights, *nothing[10:])


projector_forward.register_autograd(_autograd, setup_context=_setup_context)


@register_flop_formula(torch.ops.tokenflex.projector_forward)
def _forward_flops(
    x: Sequence[int], *shapes: Any, out_shape: Sequence[Sequence[int]], **_: Any
) -> int:
    """FLOPs of the three matrix products, for `torch.utils.flop_counter`; shapes, not tensors."""
    (rows, width), (hidden, channels) = out_shape[0], shapes[3]
    return 2 * rows * hidden * (2 * channels + width)


@register_flop_formula(torch.ops.tokenflex.projector_backward)
def _backward_flops(grad: Sequence[int], *shapes: Any, out_shape: Any = None, **_: Any) -> int:
    """FLOPs of the matrix products that `needs` asks for, and of those that are done again."""
    (hidden, channels), asked = shapes[9], shapes[-2]
    rows, width = grad
    needs, recompute = Needs(*asked), shapes[5][0] == 0
    gates = 2 * (recompute + (needs.x or needs.norm) + needs.gates)
    return 2 * rows * hidden * (gates * channels + (1 + needs.out) * width)
