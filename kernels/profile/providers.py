"""The ways to run the projector that are compared: name -> a function of (x, weights).

Everything that depends on the tiles' sides only (index tensors, groups) is made once, outside what
is timed, for the baselines; the op of this repository makes its own in every call.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import token_adaptive_projector
from kernels.passes import Weights
from kernels.profile.cases import Case

Call = Callable[[Tensor, Weights], Tensor]  # x [T, H*W, C] -> [M, D]
EPS = 1e-5
COMPILE_BACKEND = "inductor"


@dataclass(frozen=True)
class Provider:
    """One way to run the projector.

    way: what `kernels.profile.roofline` calls it. build: makes the function for a case. unfit: why
    it cannot or need not run, with what to do, or None.
    """

    name: str
    says: str
    way: str
    build: Callable[[Case, torch.device], Call]
    unfit: Callable[[Case, torch.device], str | None] = lambda case, device: None


def torch_pool(x: Tensor, n: int, case: Case) -> Tensor:
    """Pool tiles [T, H*W, C] to [T, n*n, C] as torch and the released model write it."""
    height, width = case.grid
    images = x.transpose(1, 2).unflatten(2, (height, width))  # [T, C, H, W], a view
    return TORCH_POOLS[case.pool](images, n).flatten(2).transpose(1, 2)


def _resize_pool(images: Tensor, n: int) -> Tensor:
    height, width = images.shape[2:]
    resized = (-(-height // n) * n, -(-width // n) * n)
    if resized != (height, width):
        images = F.interpolate(images, size=resized, mode="bilinear", align_corners=True)
    return F.avg_pool2d(images, kernel_size=(resized[0] // n, resized[1] // n))


TORCH_POOLS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "adaptive": F.adaptive_avg_pool2d,
    "resize": _resize_pool,
}
"""Mode -> images [T, C, H, W] and n -> [T, C, n, n]."""


def _silu_product(a: Tensor, b: Tensor) -> Tensor:
    return F.silu(a) * b


def norm_and_mlp(rows: Tensor, w: Weights, gate: Callable = _silu_product) -> Tensor:
    """LayerNorm and gated MLP, one torch op each: [.., C] -> [.., D]."""
    normed = F.layer_norm(rows, (rows.shape[-1],), w.norm_weight, w.norm_bias, EPS)
    gated = gate(F.linear(normed, w.w1, w.b1), F.linear(normed, w.w2, w.b2))
    return F.linear(gated, w.w3, w.b3)


def eager_loop(case: Case, device: torch.device) -> Call:
    """The whole projector once per tile."""

    def call(x: Tensor, w: Weights) -> Tensor:
        tiles = zip(x.unbind(0), case.sides, strict=True)
        return torch.cat([norm_and_mlp(torch_pool(tile[None], n, case)[0], w) for tile, n in tiles])

    return call


def group_by_side(case: Case, device: torch.device) -> tuple[list[tuple[int, Tensor]], Tensor]:
    """(n, its tiles) of each side, int64, and where each row lies in the groups laid in a row."""
    groups, rows = [], []
    first_row = torch.tensor(case.sides).square().cumsum(0) - torch.tensor(case.sides).square()
    for n in sorted(set(case.sides)):
        tiles = torch.tensor([tile for tile, side in enumerate(case.sides) if side == n])
        groups.append((n, tiles.to(device)))
        rows.append((first_row[tiles][:, None] + torch.arange(n * n)).flatten())
    return groups, torch.cat(rows).argsort().to(device)


def eager_grouped(case: Case, device: torch.device) -> Call:
    """The whole projector once per side n, on all tiles of that side."""
    if case.uniform:
        return lambda x, w: norm_and_mlp(torch_pool(x, case.sides[0], case), w).flatten(0, 1)
    groups, order = group_by_side(case, device)

    def call(x: Tensor, w: Weights) -> Tensor:
        found = [norm_and_mlp(torch_pool(x[own], n, case), w).flatten(0, 1) for n, own in groups]
        return torch.cat(found)[order]

    return call


def eager_batched(case: Case, device: torch.device, gate: Callable = _silu_product) -> Call:
    """Pooling once per side n, LayerNorm and MLP once for all rows."""
    if case.uniform:
        return lambda x, w: norm_and_mlp(torch_pool(x, case.sides[0], case), w, gate).flatten(0, 1)
    groups, order = group_by_side(case, device)

    def call(x: Tensor, w: Weights) -> Tensor:
        pooled = [torch_pool(x[own], n, case).flatten(0, 1) for n, own in groups]
        return norm_and_mlp(torch.cat(pooled)[order], w, gate)

    return call


def compiled(case: Case, device: torch.device) -> Call:
    """torch.compile of `eager_batched`, whole, for exactly these sides and shapes."""
    torch._dynamo.reset()  # the limit on recompilations counts those of earlier cases
    return torch.compile(
        eager_batched(case, device), fullgraph=True, dynamic=False, backend=COMPILE_BACKEND
    )


def liger(case: Case, device: torch.device) -> Call:
    """`eager_batched` with Liger-Kernel's SwiGLU."""
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return eager_batched(case, device, gate=lambda a, b: LigerSiLUMulFunction.apply(a, b))


def _liger_unfit(case: Case, device: torch.device) -> str | None:
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed; to compare with it: pip install liger-kernel"
    return None if device.type == "cuda" else "Liger's kernel needs a GPU"


def _fused_unfit(case: Case, device: torch.device) -> str | None:
    if device.type != "cuda":
        return "the fused GEMMs need a GPU"
    return None if case.dtype != "fp32" else "the fused GEMMs take bf16 and fp16"


def _batched_unfit(case: Case, device: torch.device) -> str | None:
    return "the same as eager_grouped where all tiles have one n" if case.uniform else None


def ours(backward: str, gemm: str = "auto") -> Callable[[Case, torch.device], Call]:
    """The op of this repository."""

    def build(case: Case, device: torch.device) -> Call:
        sides = torch.tensor(case.sides)
        return lambda x, w: token_adaptive_projector(
            x, sides, *w, grid=case.grid, pool=case.pool, backward=backward, gemm=gemm, eps=EPS
        )

    return build


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("eager_loop", "torch ops, tile by tile", "eager", eager_loop),
        Provider("eager_grouped", "torch ops, once per n", "eager", eager_grouped),
        Provider(
            "eager_batched",
            "torch ops, pooling per n and one MLP",
            "eager",
            eager_batched,
            _batched_unfit,
        ),
        Provider("compile", "torch.compile of eager_batched", "compile", compiled),
        Provider("liger", "eager_batched with Liger's SwiGLU", "compile", liger, _liger_unfit),
        Provider("save", "this op, backward=save", "cublas", ours("save")),
        Provider("recompute", "this op, backward=recompute", "recompute", ours("recompute")),
        Provider("fused", "this op, gemm=fused", "fused", ours("save", "fused"), _fused_unfit),
    )
}
