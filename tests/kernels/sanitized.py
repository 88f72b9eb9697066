"""The op forward and backward, to be run on a CPU by ttsem: python -m ttsem.sanitize FILE
[-- flagship]. It calls `main`.

Rows of several blocks at small widths, which races need; with "flagship" few rows at the widths of
the flagship. Results are compared with the steps in plain PyTorch.
"""

import sys

import torch
from torch import Tensor

from kernels import POOL_MODES, torch_impl, triton_impl
from kernels.passes import Needs, Weights, backward, forward
from kernels.tile_layout import square_shapes, tile_layout

SMALL = ([2, 3, 1, 11], (4, 5), (76, 136, 72))
FLAGSHIP = ([2, 1], (27, 27), (1152, 3456, 2048))
LIMIT = 2e-2  # of bfloat16, in another order of summation


def both_ways(
    do: object, shape: tuple, pool: str, keep: str, fused: bool, dtype: torch.dtype
) -> list[Tensor]:
    """The result and all gradients of seeded inputs."""
    sides, grid, (channels, hidden, width) = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=generator) * std).to(dtype)

    x = normal(len(sides) * grid[0] * grid[1], channels)
    weights = Weights(
        *(normal(channels), normal(channels)),
        *(normal(hidden, channels, std=channels**-0.5), normal(hidden)),
        *(normal(hidden, channels, std=channels**-0.5), normal(hidden)),
        *(normal(width, hidden, std=hidden**-0.5), normal(width)),
    )
    layout = tile_layout(square_shapes(sides, grid), pool, torch.device("cpu"))
    out, saved = forward(do, x, layout, weights, keep, fused, 1e-5)
    upstream = normal(*out.shape)
    needs = Needs(True, True, True, True)
    return [out, *backward(do, upstream, layout, weights, saved, needs, fused)]


def main() -> None:
    shape = FLAGSHIP if "flagship" in sys.argv else SMALL
    for pool in POOL_MODES:
        for keep, fused in (("save", False), ("recompute", True)):
            found = both_ways(triton_impl, shape, pool, keep, fused, torch.bfloat16)
            expected = both_ways(torch_impl, shape, pool, keep, False, torch.bfloat16)
            for number, (a, b) in enumerate(zip(found, expected, strict=True)):
                error = ((a.float() - b.float()).norm() / b.float().norm()).item()
                assert error < LIMIT, (pool, keep, number, error)
            print(f"{pool}, {keep}, {'fused' if fused else 'cublas'}: as in PyTorch")
