"""What holds for every batch: tiles keep to themselves, pooling is linear and has its adjoint.

Of the steps in PyTorch (float64) and in Triton (float32: on the GPU, else in the interpreter).
"""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import POOL_MODES, torch_impl, triton_impl
from kernels.dispatch import interpreting
from kernels.tile_layout import TileLayout, tile_layout
from tests.kernels.inputs import DEVICE

NO_TRITON = pytest.mark.skipif(
    DEVICE.type == "cpu" and not interpreting(), reason="needs a GPU or TRITON_INTERPRET=1"
)
TORCH = pytest.param((torch_impl, torch.float64, 1e-12), id="torch")
TRITON = pytest.param((triton_impl, torch.float32, 2e-5), id="triton", marks=NO_TRITON)
STEPS = pytest.mark.parametrize("steps", [TORCH, TRITON])
few_examples = settings(max_examples=8, derandomize=True)
CHANNELS = 5  # 4 + 1: a tail


class Batch(NamedTuple):
    """H, W, h, w of each tile, the mode, and a seed for the values."""

    shapes: list[tuple[int, int, int, int]]
    mode: str
    seed: int

    @property
    def patches(self) -> list[int]:
        return [height * width for height, width, _, _ in self.shapes]

    @property
    def tokens(self) -> list[int]:
        return [h * w for _, _, h, w in self.shapes]

    @property
    def rows(self) -> int:
        return sum(self.tokens)

    @property
    def layout(self) -> TileLayout:
        return tile_layout(self.shapes, self.mode, DEVICE)

    def normal(self, *shape: int, dtype: torch.dtype, more: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + more)
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)

    def tiles(self, dtype: torch.dtype, more: int = 0) -> Tensor:
        return self.normal(sum(self.patches), CHANNELS, dtype=dtype, more=more)


batches = st.builds(
    Batch,
    shapes=st.lists(st.tuples(*[st.integers(1, 5)] * 4), min_size=1, max_size=3),
    mode=st.sampled_from(POOL_MODES),
    seed=st.integers(0, 99),
)


def pool(steps, x: Tensor, batch: Batch) -> Tensor:
    """The pooled rows alone, [M, C]."""
    ones = torch.ones(CHANNELS, dtype=x.dtype, device=x.device)
    return steps.pool_norm(x, batch.layout, ones, ones, 1e-5)[0]


def assert_close(found: Tensor, expected: Tensor, limit: float) -> None:
    """To `limit` of the largest value there could be; both of the order of 1."""
    torch.testing.assert_close(found, expected, rtol=limit, atol=limit)


@STEPS
@given(batch=batches, order=st.randoms(use_true_random=False))
@few_examples
def test_permuting_tiles_permutes_rows_and_gradients(steps, batch, order):
    """Pooled, normed, mean and rstd of each row; the gradient of each patch."""
    module, dtype, limit = steps
    places = list(range(len(batch.shapes)))
    order.shuffle(places)
    moved = batch._replace(shapes=[batch.shapes[i] for i in places])
    x, weight = batch.tiles(dtype), batch.normal(2, CHANNELS, dtype=dtype, more=1)
    g = batch.normal(batch.rows, CHANNELS, dtype=dtype, more=2)

    def move(rows: Tensor, sizes: list[int]) -> Tensor:
        blocks = rows.split(sizes)
        return torch.cat([blocks[i] for i in places])

    there = module.pool_norm(move(x, batch.patches), moved.layout, *weight, 1e-5)
    for found, rows in zip(there, module.pool_norm(x, batch.layout, *weight, 1e-5), strict=True):
        assert_close(found, move(rows, batch.tokens), limit)
    back = module.pool_backward(move(g, batch.tokens), moved.layout)
    expected = move(module.pool_backward(g, batch.layout), batch.patches)
    assert_close(back, expected, limit)


@STEPS
@given(batch=batches, factor=st.floats(-3, 3))
@few_examples
def test_pooling_is_linear(steps, batch, factor):
    module, dtype, limit = steps
    x, y = batch.tiles(dtype), batch.tiles(dtype, more=1)
    expected = pool(module, x, batch) + factor * pool(module, y, batch)
    assert_close(pool(module, x + factor * y, batch), expected, limit)


@STEPS
@given(batch=batches)
@few_examples
def test_pool_backward_is_the_adjoint_of_pooling(steps, batch):
    """<pool(x), g> = <x, pool_backward(g)>."""
    module, dtype, limit = steps
    x, g = batch.tiles(dtype), batch.normal(batch.rows, CHANNELS, dtype=dtype, more=1)
    back = module.pool_backward(g, batch.layout)
    there = (pool(module, x, batch).double() * g.double()).sum()
    again = (x.double() * back.double()).sum()
    size = x.double().norm() * back.double().norm()
    assert abs(there - again) <= limit * size


@STEPS
@given(batch=batches)
@few_examples
def test_rows_sum_to_one(steps, batch):
    """A constant stays what it is; backward spreads each token's gradient out and loses nothing."""
    module, dtype, limit = steps
    value = batch.normal(len(batch.shapes), CHANNELS, dtype=dtype)
    x = value.repeat_interleave(torch.tensor(batch.patches, device=DEVICE), dim=0)
    expected = value.repeat_interleave(torch.tensor(batch.tokens, device=DEVICE), dim=0)
    assert_close(pool(module, x, batch), expected, limit)
    g = batch.normal(batch.rows, CHANNELS, dtype=dtype, more=1)
    sums = torch.stack([block.sum(0) for block in g.split(batch.tokens)])
    back = module.pool_backward(g, batch.layout).split(batch.patches)
    assert_close(torch.stack([block.sum(0) for block in back]), sums, limit)
