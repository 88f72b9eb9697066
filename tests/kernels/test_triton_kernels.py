"""Every Triton kernel against float64: on the GPU where there is one, else in the interpreter."""

import pytest
import torch
from torch import Tensor

from kernels import POOL_MODES, projector_reference, token_adaptive_projector
from kernels.dispatch import interpreting
from kernels.tile_layout import square_shapes, tile_layout
from kernels.triton_impl import norm, norm_backward, pool_backward, pool_norm, swiglu
from kernels.triton_impl import swiglu_backward as triton_swiglu_backward
from kernels.triton_impl.column_sum import column_sum
from tests.kernels.inputs import (
    DEVICE,
    gradients,
    make_tiles,
    make_weights,
    relative_error,
    torch_pool,
)

pytestmark = pytest.mark.skipif(
    DEVICE.type == "cpu" and not interpreting(), reason="needs a GPU or TRITON_INTERPRET=1"
)
# The interpreter cuts bfloat16 off where a GPU rounds to nearest: twice the error of one rounding.
LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
WIDE_BF16 = 2e-2 if DEVICE.type == "cpu" else 1e-2
DTYPES = list(LIMITS)
GRID, SIDES = (4, 5), [2, 3, 1, 6]  # not square; smaller and larger than the grid, and 1
ROWS = sum(n * n for n in SIDES)
CHANNELS = 72  # 64 + 8: a tail


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.empty and empty_like return is full of NaN: what no kernel writes shows."""

    def poison(allocate):
        def allocated(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return allocated

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))


def normal(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


def assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype and found.shape == expected.shape
    assert relative_error(found, expected) < LIMITS[dtype]


def float64_pool(x: Tensor, sides: list[int], grid: tuple[int, int], pool: str) -> Tensor:
    images = x.double().cpu().transpose(1, 2).unflatten(2, grid)
    rows = [
        torch_pool(image[None], n, pool)[0].flatten(1).T
        for image, n in zip(images, sides, strict=True)
    ]
    return torch.cat(rows)


@pytest.mark.parametrize("pool", POOL_MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pool_norm(dtype, pool):
    x = make_tiles(len(SIDES), GRID, channels=CHANNELS).to(dtype).to(DEVICE)
    weight, bias = normal(2, CHANNELS, dtype=dtype, seed=3)
    layout = tile_layout(square_shapes(SIDES, GRID), pool, DEVICE)
    pooled, normed, mean, rstd = pool_norm(x.flatten(0, 1), layout, weight, bias, 1e-5)
    expected = float64_pool(x, SIDES, GRID, pool)
    assert_close(pooled, expected, dtype)
    rows = pooled.double().cpu()  # the norm sees what was rounded
    expected_mean, variance = rows.mean(1), rows.var(1, correction=0)
    assert relative_error(mean, expected_mean) < 1e-5
    assert relative_error(rstd, (variance + 1e-5).rsqrt()) < 1e-5
    unit = (rows - expected_mean[:, None]) * (variance + 1e-5).rsqrt()[:, None]
    assert_close(normed, unit * weight.double().cpu() + bias.double().cpu(), dtype)
    assert torch.equal(norm(pooled, mean, rstd, weight, bias), normed)
    nothing, again, _, _ = pool_norm(x.flatten(0, 1), layout, weight, bias, 1e-5, keep_pooled=False)
    assert nothing.shape == (0, CHANNELS) and torch.equal(again, normed)


@pytest.mark.parametrize("channels", [1, 8, 64, 72, 96])
def test_pool_norm_of_one_row_at_any_width(channels):
    """One row; widths with and without a tail."""
    x = make_tiles(1, (3, 2), channels=channels).float().to(DEVICE)
    weight, bias = normal(2, channels, dtype=torch.float32, seed=3)
    layout = tile_layout(square_shapes([1], (3, 2)), "adaptive", DEVICE)
    pooled, normed, _, _ = pool_norm(x.flatten(0, 1), layout, weight, bias, 1e-5)
    assert_close(pooled, float64_pool(x, [1], (3, 2), "adaptive"), torch.float32)
    expected = torch.nn.functional.layer_norm(pooled, (channels,), weight, bias)
    torch.testing.assert_close(normed, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pool", POOL_MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pool_backward(dtype, pool):
    grad = normal(ROWS, CHANNELS, dtype=dtype, seed=4)
    x = make_tiles(len(SIDES), GRID, channels=CHANNELS).requires_grad_()
    float64_pool(x, SIDES, GRID, pool).backward(grad.double().cpu())
    found = pool_backward(grad, tile_layout(square_shapes(SIDES, GRID), pool, DEVICE))
    assert_close(found, x.grad.flatten(0, 1), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, channels", [(1, CHANNELS), (40, CHANNELS), (3, 64)])
def test_norm_backward(rows, channels, dtype, monkeypatch):
    monkeypatch.setattr("kernels.triton_impl.layer_norm.PROGRAMS", 7)  # several rows each
    grad = normal(rows, channels, dtype=dtype, seed=5)
    pooled = normal(rows, channels, dtype=dtype, seed=6)
    weight, bias = normal(2, channels, dtype=dtype, seed=7)
    leaves = [t.double().cpu().requires_grad_() for t in (pooled, weight, bias)]
    out = torch.nn.functional.layer_norm(leaves[0], (channels,), *leaves[1:])
    out.backward(grad.double().cpu())
    mean = leaves[0].mean(1).float().to(DEVICE)
    rstd = (leaves[0].var(1, correction=0) + 1e-5).rsqrt().float().to(DEVICE).detach()
    inputs = (grad, pooled, mean.detach(), rstd, weight, bias)
    found = norm_backward(*inputs, keep_grad=True, keep_normed=True)
    assert_close(found[0], leaves[0].grad, dtype)
    assert_close(found[1], leaves[1].grad, torch.float32)
    assert_close(found[2], leaves[2].grad, torch.float32)
    assert_close(found[3], out.detach(), dtype)
    again = norm_backward(*inputs, keep_grad=False, keep_normed=False)
    assert all(torch.equal(a, b) for a, b in zip(again[1:3], found[1:3], strict=True))
    assert again[0].shape == again[3].shape == (0, channels)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, hidden", [(1, 40), (130, 136)])
def test_swiglu(rows, hidden, dtype):
    gate, value, grad = normal(3, rows, hidden, dtype=dtype, seed=8)
    leaves = [t.double().cpu().requires_grad_() for t in (gate, value)]
    product = torch.nn.functional.silu(leaves[0]) * leaves[1]
    product.backward(grad.double().cpu())
    assert_close(swiglu(gate, value), product.detach(), dtype)
    kept = gate.clone(), value.clone()
    found = triton_swiglu_backward(grad.clone(), gate, value)
    assert torch.equal(gate, kept[0]) and torch.equal(value, kept[1])  # saved: never written
    for tensor, expected in zip(found, (leaves[0].grad, leaves[1].grad, product), strict=False):
        assert_close(tensor, expected.detach(), dtype)
    for total, part in zip(found[3:], found[:2], strict=True):
        torch.testing.assert_close(total.double(), part.double().sum(0), rtol=1e-4, atol=1e-4)
    in_place = triton_swiglu_backward(grad.clone(), gate, value, overwrite=True)
    assert all(torch.equal(a, b) for a, b in zip(in_place, found, strict=True))
    assert in_place[0] is gate and in_place[1] is value


@pytest.mark.parametrize("rows, columns", [(1, 1), (70, 45)])
def test_column_sum(rows, columns):
    parts = normal(rows, columns, dtype=torch.float32, seed=9)
    assert_close(column_sum(parts), parts.double().sum(0), torch.float32)


@pytest.mark.parametrize("backward", ["save", "recompute"])
@pytest.mark.parametrize(
    "dtype, gemm",
    [
        (torch.float32, "cublas"),
        (torch.float16, "cublas"),
        (torch.bfloat16, "cublas"),
        (torch.float16, "fused"),
        (torch.bfloat16, "fused"),
    ],
)
def test_the_whole_op(dtype, gemm, backward):
    sides, grid = [2, 3], (4, 5)
    x = make_tiles(2, grid, channels=CHANNELS).to(dtype)
    weights = {k: w.to(dtype) for k, w in make_weights(channels=CHANNELS, hidden=40).items()}
    upstream = normal(13, 7, dtype=dtype, seed=10)
    wide = {name: weight.double() for name, weight in weights.items()}
    expected = gradients(
        lambda x, w: projector_reference(x, sides, **w, grid=grid), x.double(), wide, upstream.cpu()
    )
    on_device = {name: weight.to(DEVICE) for name, weight in weights.items()}

    def call(x: Tensor, w: dict[str, Tensor]) -> Tensor:
        return token_adaptive_projector(
            x, sides, **w, grid=grid, impl="triton", gemm=gemm, backward=backward
        )

    found = gradients(call, x.to(DEVICE), on_device, upstream)
    limit = WIDE_BF16 if dtype == torch.bfloat16 else LIMITS[dtype]
    for name, a, b in zip(("out", "x", *weights), found, expected, strict=True):
        assert a.dtype == dtype
        assert relative_error(a, b) < limit, name
    again = gradients(call, x.to(DEVICE), on_device, upstream)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
