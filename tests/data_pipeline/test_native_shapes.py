"""Patches and tokens of images at their own aspect ratio: the one rule, against plain searches."""

import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from transformers.models.siglip2 import image_processing_pil_siglip2 as siglip2

from data_pipeline.processor.native_shapes_tokenflex import patch_grid, token_grid

SIDES = st.one_of(st.integers(1, 40), st.integers(1, 5000), st.integers(1, 65535))
PATCHES = st.integers(1, 40)
LIMITS = st.one_of(st.integers(1, 64), st.integers(1, 5000))


# Two sides that are rounded up at scales closer together than transformers looks, and almost.
@example(1887, 5951, 16, 576)
@example(4171, 5561, 16, 1024)
@given(SIDES, SIDES, st.sampled_from([14, 16, 32]), LIMITS)
def test_a_filled_image_has_the_patches_that_transformers_gives_it(
    height: int, width: int, patch: int, limit: int
) -> None:
    assume(max(height, width) <= limit * min(height, width))
    size = siglip2.get_image_size_for_max_num_patches(height, width, patch, limit)
    expected = tuple(side // patch for side in size)
    assert patch_grid(height, width, patch, limit, limit) == expected


# By hand: a strip, too long a strip, both sides full at one scale, a pixel enlarged 100 times.
@pytest.mark.parametrize(
    "height, width, limit, expected",
    [
        (16, 3200, 200, (1, 200)),
        (16, 3200, 64, None),
        (1600, 16, 50, None),
        (3000, 4000, 1024, (27, 36)),
        (4000, 3000, 256, (18, 14)),
        (1, 1, 4096, (7, 7)),
    ],
)
def test_extremes(height: int, width: int, limit: int, expected: tuple[int, int] | None) -> None:
    if expected is None:
        with pytest.raises(ValueError, match=rf"{width} x {height} pixels.*{limit} patches"):
            patch_grid(height, width, 16, limit, limit)
    else:
        assert patch_grid(height, width, 16, limit, limit) == expected


@given(SIDES, SIDES, st.sampled_from([14, 16]), LIMITS, LIMITS)
def test_an_image_between_the_limits_keeps_its_size(
    height: int, width: int, patch: int, one: int, other: int
) -> None:
    least, most = sorted((one, other))
    assume(max(height, width) <= most * min(height, width))
    own = math.ceil(height / patch), math.ceil(width / patch)
    rows, columns = found = patch_grid(height, width, patch, most, least)
    assert 1 <= rows * columns <= most
    if least <= own[0] * own[1] <= most:
        assert found == own
    elif own[0] * own[1] > most:  # smaller: as if it had to fill the larger limit
        assert found == patch_grid(height, width, patch, most, most)
        assert rows <= own[0] and columns <= own[1]
    else:  # enlarged
        assert rows * columns <= least and rows >= own[0] and columns >= own[1]
        if max(height, width) <= least * min(height, width):
            assert found == patch_grid(height, width, patch, least, least)


def largest_scale(rows: int, columns: int, budget: int) -> tuple[int, int]:
    """Every scale at which a side changes, the largest that fits."""
    scales = {Fraction(k, side) for side in (rows, columns) for k in range(1, side + 1)}
    grids = [(scale, math.ceil(rows * scale), math.ceil(columns * scale)) for scale in scales]
    return max((s, h, w) for s, h, w in grids if h * w <= budget)[1:]


@given(PATCHES, PATCHES, st.integers(1, 1700))
def test_tokens_are_the_largest_scale_of_all(rows: int, columns: int, budget: int) -> None:
    # Below the least of these scales both sides are 1.
    expected = largest_scale(rows, columns, budget) if budget > 1 else (1, 1)
    assert token_grid(rows, columns, budget) == expected


@given(st.integers(1, 1024), st.integers(1, 1024), st.integers(1, 5000))
def test_tokens_keep_to_budget_patches_and_aspect(rows: int, columns: int, budget: int) -> None:
    h, w = token_grid(rows, columns, budget)
    assert 1 <= h <= rows and 1 <= w <= columns and h * w <= budget
    assert token_grid(columns, rows, budget) == (w, h)
    more = token_grid(rows, columns, budget + 1)
    assert more[0] >= h and more[1] >= w
    # There is a scale that both sides are rounded up from.
    assert max(Fraction(h - 1, rows), Fraction(w - 1, columns)) < min(
        Fraction(h, rows), Fraction(w, columns)
    )
    if budget >= rows * columns:
        assert (h, w) == (rows, columns)


@given(st.integers(1, 64), st.integers(1, 64), st.integers(0, 200))
def test_square_tiles_keep_their_numbers(side: int, n: int, more: int) -> None:
    n = min(n, side)
    if n < side:
        more = min(more, 2 * n)  # up to the next square
    assert token_grid(side, side, n * n + more) == (n, n)


@pytest.mark.parametrize(
    "patches, budget, expected",
    [
        ((1, 200), 64, (1, 64)),
        ((2, 100), 64, (1, 50)),
        ((27, 36), 144, (10, 14)),
        ((32, 32), 150, (12, 12)),
        ((3, 5), 1000, (3, 5)),
        ((40, 1), 1, (1, 1)),
    ],
)
def test_tokens_by_hand(patches: tuple[int, int], budget: int, expected: tuple[int, int]) -> None:
    assert token_grid(*patches, budget) == expected


@pytest.mark.parametrize(
    "call, arguments, named",
    [
        (token_grid, (3, 4, 0), "budget of 0"),
        (token_grid, (0, 4, 9), "0 x 4 patches"),
        (patch_grid, (0, 5, 16, 64), "5 x 0 pixels"),
        (patch_grid, (9, 9, 0, 64), "patch_size is 0"),
        (patch_grid, (9, 9, 16, 64, 65), "data.patches.min is 65 .*max 64"),
        (patch_grid, (9, 9, 16, 64, 0), "data.patches.min is 0"),
    ],
)
def test_values_out_of_range_are_named(call: Any, arguments: tuple[int, ...], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call(*arguments)
