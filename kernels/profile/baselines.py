"""The projector in torch's own ops, three ways: what this repository's op is compared with.

Everything that depends on the tiles' sides only (index tensors, groups) is made once, outside what
is timed; the op of this repository makes its own in every call.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.passes import Weights
from kernels.profile.cases import Case

Call = Callable[[Tensor, Weights], Tensor]  # x [T, H*W, C] -> [M, D]
EPS = 1e-5


@dataclass(frozen=True)
class Provider:
    """One way to run the projector.

    way: what `kernels.profile.roofline` calls it. build: makes the function for a case. unfit: why
    it cannot or need not run, with what to do, or None. build_s: seconds its first call takes,
    about. default: whether it runs where no providers are asked for.
    """

    name: str
    says: str
    way: str
    build: Callable[[Case, torch.device], Call]
    unfit: Callable[[Case, torch.device], str | None] = lambda case, device: None
    build_s: float = 1.0
    default: bool = True


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


def eager_batched(case: Case, device: torch.device, mlp: Call = norm_and_mlp) -> Call:
    """Pooling once per side n, LayerNorm and MLP once for all rows: mlp(rows [.., C], weights)."""
    if case.uniform:
        return lambda x, w: mlp(torch_pool(x, case.sides[0], case), w).flatten(0, 1)
    groups, order = group_by_side(case, device)

    def call(x: Tensor, w: Weights) -> Tensor:
        pooled = [torch_pool(x[own], n, case).flatten(0, 1) for n, own in groups]
        return mlp(torch.cat(pooled)[order], w)

    return call
