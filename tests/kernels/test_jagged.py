"""Tiles of any shape, each to its own h x w tokens: against torch in float64, tile by tile."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

import kernels.registration as ops
from kernels import POOL_MODES, jagged_projector, token_adaptive_projector
from kernels.dispatch import interpreting
from kernels.tile_layout import tile_layout
from tests.kernels.inputs import (
    DEVICE,
    WIDTH,
    gradients,
    make_tiles,
    make_weights,
    relative_error,
)

TRITON = pytest.param(
    "triton",
    marks=pytest.mark.skipif(
        DEVICE.type == "cpu" and not interpreting(), reason="needs a GPU or TRITON_INTERPRET=1"
    ),
)
# Wide, tall, one line, a single patch, more tokens than patches, and the same shape twice.
SHAPES = [(3, 7, 2, 5), (9, 2, 4, 1), (1, 11, 1, 4), (1, 1, 1, 1), (2, 3, 5, 4), (3, 7, 2, 5)]


def torch_pool(image: Tensor, h: int, w: int, pool: str) -> Tensor:
    """[C, H, W] -> [C, h, w], as torch and the released code write the two modes."""
    if pool == "adaptive":
        return F.adaptive_avg_pool2d(image, (h, w))
    height, width = (-(-size // n) * n for size, n in zip(image.shape[1:], (h, w), strict=True))
    if (height, width) != tuple(image.shape[1:]):
        image = F.interpolate(
            image[None], size=(height, width), mode="bilinear", align_corners=True
        )[0]
    return F.avg_pool2d(image, (height // h, width // w))


def tile_by_tile(x: Tensor, shapes: list, w: dict[str, Tensor], pool: str) -> Tensor:
    rows = []
    for (height, width, *target), patches in zip(
        shapes, x.split([height * width for height, width, _, _ in shapes]), strict=True
    ):
        image = patches.T.unflatten(1, (height, width))
        rows.append(torch_pool(image, *target, pool).flatten(1).T)
    normed = F.layer_norm(torch.cat(rows), x.shape[1:], w["norm_weight"], w["norm_bias"])
    gate = F.silu(normed @ w["w1"].T + w["b1"]) * (normed @ w["w2"].T + w["b2"])
    return gate @ w["w3"].T + w["b3"]


def patches_of(shapes: list, dtype: torch.dtype = torch.float64) -> Tensor:
    total = sum(height * width for height, width, _, _ in shapes)
    return make_tiles(1, (1, total))[0].to(dtype).to(DEVICE)


@pytest.mark.parametrize(
    "impl, dtype, limit",
    [
        ("torch", torch.float64, 1e-12),
        pytest.param("triton", torch.float32, 1e-5, marks=TRITON.marks),
        pytest.param("triton", torch.bfloat16, 3e-2, marks=TRITON.marks),
    ],
)
@pytest.mark.parametrize("pool", POOL_MODES)
def test_any_mix_of_shapes_equals_torch_tile_by_tile(pool, impl, dtype, limit):
    """The result and all nine gradients."""
    x = patches_of(SHAPES, dtype)
    weights = {name: w.to(dtype).to(DEVICE) for name, w in make_weights().items()}
    rows = sum(h * w for _, _, h, w in SHAPES)
    upstream = make_tiles(1, (1, rows), seed=4, channels=WIDTH)[0].to(dtype).to(DEVICE)
    found = gradients(
        lambda x, w: jagged_projector(x, SHAPES, **w, pool=pool, impl=impl), x, weights, upstream
    )
    wide = {name: w.double() for name, w in weights.items()}
    expected = gradients(
        lambda x, w: tile_by_tile(x, SHAPES, w, pool), x.double(), wide, upstream.double()
    )
    for name, a, b in zip(("out", "x", *weights), found, expected, strict=True):
        assert relative_error(a, b) < limit, name


shapes_of_batches = st.lists(st.tuples(*[st.integers(1, 9)] * 4), min_size=1, max_size=4)


@given(shapes=shapes_of_batches, pool=st.sampled_from(POOL_MODES))
@settings(max_examples=40, derandomize=True)
def test_random_shapes(shapes, pool):
    x, weights = patches_of(shapes).requires_grad_(), make_weights()
    found = jagged_projector(x, shapes, **weights, pool=pool, impl="torch")
    expected = tile_by_tile(x, shapes, weights, pool)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(found)
    torch.testing.assert_close(
        *(torch.autograd.grad(out, x, upstream)[0] for out in (found, expected))
    )


@pytest.mark.parametrize("impl", ["torch", TRITON])
@pytest.mark.parametrize("pool", POOL_MODES)
def test_square_tiles_of_one_grid_are_the_special_case(pool, impl):
    """The same bits, as a list and as a tensor."""
    sides, grid = [3, 1, 4, 3], (5, 4)
    x = make_tiles(len(sides), grid).float().to(DEVICE)
    weights = {name: w.float().to(DEVICE) for name, w in make_weights().items()}
    shapes = [(*grid, n, n) for n in sides]
    expected = token_adaptive_projector(x, sides, **weights, grid=grid, pool=pool, impl=impl)
    for given_as in (shapes, torch.tensor(shapes)):
        found = jagged_projector(x.flatten(0, 1), given_as, **weights, pool=pool, impl=impl)
        assert torch.equal(found, expected)


def test_registration():
    x, weights = patches_of(SHAPES), make_weights()
    leaves = [tensor.requires_grad_() for tensor in (x, *weights.values())]
    options = ops.Options("adaptive", "save", "torch", "auto", 1e-5).encode()
    opcheck(ops.projector_forward, (leaves[0], torch.tensor(SHAPES), *leaves[1:], options))


def test_the_grid_of_launch_entries():
    shapes = [(3, 4, 1, 1), (3, 4, 2, 3)]
    assert tile_layout(shapes, "adaptive", DEVICE).grid == (3, 4)
    assert tile_layout([*shapes, (4, 3, 1, 1)], "adaptive", DEVICE).grid == "mixed"


@pytest.mark.parametrize(
    "shapes, message",
    [
        (None, "shapes is None.*four whole numbers"),
        ([(3, 7, 2)], r"shapes\[0\] is \(3, 7, 2\).*H, W, h, w"),
        ([(3, 7, 2, 5.0)], r"shapes\[0\] is .*5.0"),
        ([3, 7, 2, 5], "shapes is .*four"),
        ([(3, 7, 0, 5)], r"shapes\[0\] asks for 0 x 5.*3 x 7"),
        ([(3, 7, 2, 2000)], "largest side is 2000.* 1024"),
        ([(3, 6, 2, 5)], "x has 21 patches and the shapes 18"),
        (torch.ones(1, 3, dtype=torch.int64), r"\(1, 3\).*four whole numbers"),
        (torch.ones(1, 4), "float32.*four whole numbers"),
    ],
)
def test_wrong_shapes_are_refused(shapes, message):
    x = patches_of([(3, 7, 2, 5)])
    with pytest.raises(ValueError, match=message):
        jagged_projector(x, shapes, **make_weights())


def test_tiles_where_patches_of_all_are_expected():
    with pytest.raises(ValueError, match=r"x has shape \(1, 21, 12\).*patches of all tiles, C"):
        jagged_projector(patches_of([(3, 7, 2, 5)])[None], [(3, 7, 2, 5)], **make_weights())
