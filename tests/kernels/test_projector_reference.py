"""The op in plain PyTorch, the reference and the pooling tables against torch in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import POOL_MODES, pooling_table, projector_reference, token_adaptive_projector
from kernels.tables import span_tables
from tests.kernels.inputs import (
    CHANNELS,
    HIDDEN,
    WIDTH,
    eager,
    make_tiles,
    make_weights,
    relative_error,
)

SIDES = list(range(1, 25))
GRIDS = [(8, 8), (27, 27), (5, 9), (3, 32)]


@pytest.mark.parametrize("size", [1, 2, 5, 8, 9, 16, 27])
def test_tables_equal_torch_pooling(size):
    line = torch.eye(size, dtype=torch.float64)[None]  # [1, size patches as channels, size]
    for n in SIDES:
        adaptive = F.adaptive_avg_pool1d(line, n)[0].T
        torch.testing.assert_close(torch.tensor(pooling_table(n, size, "adaptive")), adaptive)
        resized = -(-size // n) * n
        stretched = F.interpolate(
            line[..., None], size=(resized, 1), mode="bilinear", align_corners=True
        )[..., 0]
        expected = F.avg_pool1d(stretched, resized // n)[0].T
        found = torch.tensor(pooling_table(n, size, "resize"))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_modes_agree_only_where_the_side_divides_the_grid():
    for n in (1, 3, 9, 27):
        assert abs(pooling_table(n, 27, "adaptive") - pooling_table(n, 27, "resize")).max() < 1e-12
    for n in (8, 12, 16, 24):
        assert abs(pooling_table(n, 27, "adaptive") - pooling_table(n, 27, "resize")).max() > 0.01


def test_tables_are_shared_and_cannot_be_written():
    table = pooling_table(4, 27, "adaptive")
    assert pooling_table(4, 27, "adaptive") is table
    with pytest.raises(ValueError, match="read-only"):
        table[0, 0] = 5


@pytest.mark.parametrize("pool", POOL_MODES)
@pytest.mark.parametrize("grid", GRIDS)
def test_spans_hold_the_whole_table_and_its_adjoint(grid, pool):
    pairs = tuple((n, size) for n in SIDES for size in grid)
    tables = span_tables(pairs, pool, torch.device("cpu"))
    for n, size in pairs:
        dense = torch.from_numpy(pooling_table(n, size, pool).copy()).float()
        first = tables.begin[n, size]
        assert torch.equal(filled(tables, range(first, first + n), size), dense)
        assert torch.equal(filled(tables, range(first + n, first + n + size), n), dense.T)


def filled(spans, rows, width) -> Tensor:
    """The rows as a dense matrix."""
    dense = torch.zeros(len(rows), width)
    for line, (first, length, at) in zip(dense, spans.index[list(rows)].tolist(), strict=True):
        line[first : first + length] = spans.weights[at : at + length]
    return dense


@pytest.mark.parametrize("call", [token_adaptive_projector, projector_reference])
@pytest.mark.parametrize("pool", POOL_MODES)
@pytest.mark.parametrize("grid", GRIDS)
def test_every_side_mixed_in_one_call_equals_torch(grid, pool, call):
    order = torch.randperm(2 * len(SIDES), generator=torch.Generator().manual_seed(3)).tolist()
    sides = [(SIDES * 2)[i] for i in order]
    x, weights = make_tiles(len(sides), grid), make_weights()
    expected = eager(x, sides, weights, grid, pool)
    found = call(x, sides, **weights, grid=grid, pool=pool)
    assert found.shape == (sum(n * n for n in sides), WIDTH)
    assert relative_error(found, expected) < 1e-12
    single = {name: weight.float() for name, weight in weights.items()}
    found = call(x.float(), torch.tensor(sides), **single, grid=grid, pool=pool)
    assert found.dtype == torch.float32
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("pool", POOL_MODES)
def test_bfloat16_is_no_worse_than_eager_bfloat16(pool):
    grid, sides = (27, 27), [16, 8, 12, 8]
    weights, x = make_weights(torch.bfloat16), make_tiles(4, grid).bfloat16()
    wide = {name: weight.double() for name, weight in weights.items()}
    expected = eager(x.double(), sides, wide, grid, pool)
    found = token_adaptive_projector(x, sides, **weights, grid=grid, pool=pool)
    assert found.dtype == torch.bfloat16
    assert relative_error(found, expected) < 1e-2
    assert relative_error(found, expected) <= 2 * relative_error(
        eager(x, sides, weights, grid, pool), expected
    )


def test_pooled_is_rounded_to_the_weights_dtype_before_the_norm():
    grid, sides, weights = (8, 8), [2, 4, 2], make_weights(torch.bfloat16)
    x = make_tiles(3, grid).bfloat16()
    windows = [x.float()[i].reshape(n, 8 // n, n, 8 // n, CHANNELS) for i, n in enumerate(sides)]
    pooled = torch.cat([window.mean((1, 3)).flatten(0, 1) for window in windows]).bfloat16()
    normed = F.layer_norm(pooled, (CHANNELS,), weights["norm_weight"], weights["norm_bias"])
    gate = F.silu(F.linear(normed, weights["w1"], weights["b1"]).float())
    gate = (gate * F.linear(normed, weights["w2"], weights["b2"]).float()).bfloat16()
    expected = F.linear(gate, weights["w3"], weights["b3"])
    found = token_adaptive_projector(x, sides, **weights, grid=grid)
    # Sums of bfloat16 in float32 may differ in their last bit, which rounding nearly always hides.
    assert (found == expected).float().mean() > 0.95


def test_permuting_tiles_permutes_their_rows():
    sides, weights = [2, 8, 3, 8, 1], make_weights(torch.float32)
    x = make_tiles(5, (8, 8)).float()
    blocks = token_adaptive_projector(x, sides, **weights, grid=(8, 8)).split(
        [n * n for n in sides]
    )
    order = [3, 0, 4, 1, 2]
    found = token_adaptive_projector(x[order], [sides[i] for i in order], **weights, grid=(8, 8))
    torch.testing.assert_close(found, torch.cat([blocks[i] for i in order]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("pool", POOL_MODES)
def test_gradients(pool):
    x = make_tiles(3, (3, 4)).requires_grad_()
    weights = {name: weight.requires_grad_() for name, weight in make_weights().items()}

    def call(x: Tensor, *values: Tensor) -> Tensor:
        named = dict(zip(weights, values, strict=True))
        return token_adaptive_projector(x, [2, 5, 2], **named, grid=(3, 4), pool=pool)

    assert torch.autograd.gradcheck(call, (x, *weights.values()))


def test_no_tiles_give_no_rows_but_stay_in_the_graph():
    x = torch.zeros(0, 64, CHANNELS, requires_grad=True)
    weights = {name: w.requires_grad_() for name, w in make_weights(torch.float32).items()}
    found = token_adaptive_projector(x, [], **weights, grid=(8, 8))
    assert found.shape == (0, WIDTH) and found.dtype == torch.float32
    found.sum().backward()
    for tensor in (x, *weights.values()):
        assert tensor.grad is not None and not tensor.grad.any()


def test_works_for_training_after_a_first_call_in_inference_mode():
    weights = {name: w.requires_grad_() for name, w in make_weights(torch.float32).items()}
    x = make_tiles(2, (6, 6)).float().requires_grad_()
    with torch.inference_mode():
        first = token_adaptive_projector(x, [5, 2], **weights, grid=(6, 6))
    second = token_adaptive_projector(x, [5, 2], **weights, grid=(6, 6))
    second.sum().backward()
    assert torch.equal(first, second.detach()) and x.grad.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tile_sides": [2]}, "1 .*2 tiles"),
        ({"tile_sides": [2, 0]}, r"tile_sides\[1\] is 0"),
        ({"tile_sides": [2, 3.0]}, r"tile_sides\[1\] is 3.0"),
        ({"tile_sides": [True, 3]}, r"tile_sides\[0\] is True"),
        ({"tile_sides": torch.ones(2, device="meta", dtype=torch.int64)}, "pass a list"),
        ({"grid": (8, 7)}, r"grid \(8, 7\) .*64 patches"),
        ({"grid": (-8, -8)}, r"grid \(-8, -8\)"),
        ({"pool": "max"}, "max.* adaptive, resize"),
        ({"x": torch.zeros(2, 64)}, "expected .tiles, H.W, C."),
        ({"x": torch.zeros(2, 64, CHANNELS, dtype=torch.int64)}, "expected a floating-point"),
        (
            {"w2": torch.zeros(HIDDEN + 1, CHANNELS)},
            r"w2 .*\(21, 12\).*\(20, 12\)",
        ),
        ({"b3": torch.zeros(WIDTH, dtype=torch.bfloat16)}, "b3 .*bfloat16 on cpu"),
        ({"w3": torch.zeros(WIDTH, HIDDEN, device="meta")}, "w3 .*float32 on meta"),
    ],
)
def test_wrong_arguments_say_what_was_found_and_expected(change, message):
    arguments = {
        "x": torch.zeros(2, 64, CHANNELS),
        "tile_sides": [2, 3],
        "grid": (8, 8),
        **make_weights(torch.float32),
    }
    token_adaptive_projector(**arguments)
    with pytest.raises(ValueError, match=message):
        token_adaptive_projector(**{**arguments, **change})


def test_tables_refuse_impossible_sizes():
    with pytest.raises(ValueError, match="at least 1"):
        pooling_table(0, 8, "adaptive")
    with pytest.raises(ValueError, match="use one of"):
        pooling_table(1, 8, "max")
