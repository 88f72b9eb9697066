"""Tiling follows InternVL's rule, and the number of tiles is known from the size alone."""

import tracemalloc
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from data_pipeline.processor import tiling_tokenflex
from data_pipeline.tiling import TilingSettings, count_tiles, grid_for, num_tiles
from tests.data_pipeline.pictures import cut_tiles


def internvl_grid(width: int, height: int, size: int, low: int, high: int) -> tuple[int, int]:
    """The rule as InternVL states it, written out plainly."""
    grids = sorted(
        {(i, j) for i in range(1, high + 1) for j in range(1, high + 1) if low <= i * j <= high},
        key=lambda grid: (grid[0] * grid[1], grid),
    )
    best, best_difference = (1, 1), float("inf")
    for i, j in grids:
        difference = abs(width / height - i / j)
        if difference < best_difference:
            best, best_difference = (i, j), difference
        elif difference == best_difference and width * height > 0.5 * size * size * i * j:
            best = (i, j)
    return best


limits = st.tuples(st.integers(1, 12), st.integers(1, 12)).map(sorted)


# Small tiles, so that sizes below and above half of a grid's pixels are met, and ties by multiples.
sides = st.integers(1, 5000) | st.integers(1, 24).map(lambda n: 96 * n) | st.integers(1, 10**6)
sizes = st.tuples(sides, sides)


@given(st.lists(sizes, min_size=1, max_size=30), limits, st.sampled_from([1, 64, 192, 384]))
def test_grids_are_internvls_for_one_image_and_for_many(
    sizes: list[tuple[int, int]], limit: list[int], size: int
) -> None:
    low, high = limit
    expected = [internvl_grid(width, height, size, low, high) for width, height in sizes]
    widths, heights = np.array(sizes).T
    with mock.patch.object(tiling_tokenflex, "_AT_ONCE", 200):  # several slices
        found = tiling_tokenflex.grids_for(widths, heights, size, low, high)
    assert list(map(tuple, found.tolist())) == expected
    tiling = TilingSettings(tile_size=size, min_tiles=low, max_tiles=high)
    assert [grid_for(*each, tiling) for each in sizes] == expected
    counts = [columns * rows + (columns * rows > 1) for columns, rows in expected]
    assert count_tiles(widths, heights, tiling).tolist() == counts


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((384, 384), (1, 1)),
        ((800, 400), (2, 1)),
        ((400, 800), (1, 2)),
        ((1600, 900), (7, 4)),
        ((10_000, 10), (12, 1)),
        ((10, 10_000), (1, 12)),
    ],
)
def test_known_grids(size: tuple[int, int], grid: tuple[int, int]) -> None:
    max_tiles = 28 if grid == (7, 4) else 12
    assert grid_for(*size, TilingSettings(max_tiles=max_tiles)) == grid


def test_equal_ratios_take_the_larger_grid_for_a_larger_image() -> None:
    tiling = TilingSettings(tile_size=100, max_tiles=12)
    # 2 x 2 holds 40_000 pixels, 3 x 3 holds 90_000; more than half of that is needed.
    assert grid_for(141, 141, tiling) == (1, 1)
    assert grid_for(142, 142, tiling) == (2, 2)
    assert grid_for(212, 212, tiling) == (2, 2)
    assert grid_for(213, 213, tiling) == (3, 3)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), limits, st.booleans(), st.integers(1, 20))
def test_number_of_tiles_is_what_is_cut(
    width: int, height: int, limit: list[int], thumbnail: bool, size: int
) -> None:
    tiling = TilingSettings(
        tile_size=size, min_tiles=limit[0], max_tiles=limit[1], thumbnail=thumbnail
    )
    tiles = cut_tiles(Image.new("RGB", (width, height), (1, 2, 3)), tiling)
    assert tiles.dtype == np.uint8
    assert tiles.shape == (num_tiles(width, height, tiling), 3, size, size)
    assert (tiles == np.array([1, 2, 3]).reshape(1, 3, 1, 1)).all()
    columns, rows = grid_for(width, height, tiling)
    assert limit[0] <= columns * rows <= limit[1]
    assert len(tiles) == columns * rows + (thumbnail and columns * rows > 1)


def test_tiles_go_row_by_row_and_the_thumbnail_comes_last() -> None:
    size, columns, rows = 8, 3, 2
    image = Image.new("RGB", (columns * size, rows * size))
    for number in range(columns * rows):
        row, column = divmod(number, columns)
        color = (number * 40, 255 - number * 40, 7)
        image.paste(color, (column * size, row * size, (column + 1) * size, (row + 1) * size))
    tiles = cut_tiles(image, TilingSettings(tile_size=size, min_tiles=6, max_tiles=6))
    assert len(tiles) == 7
    for number in range(6):
        assert (tiles[number] == np.array([number * 40, 255 - number * 40, 7])[:, None, None]).all()
    whole = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
    assert (tiles[6] == whole.transpose(2, 0, 1)).all()


def test_pixels_are_those_of_internvls_crops() -> None:
    noise = np.random.default_rng(0).integers(256, size=(37, 80, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    tiles = cut_tiles(image, TilingSettings(tile_size=16, max_tiles=6))
    columns, rows = grid_for(80, 37, TilingSettings(tile_size=16, max_tiles=6))
    resized = image.resize((columns * 16, rows * 16), Image.Resampling.BICUBIC)
    for number, tile in enumerate(tiles[:-1]):
        left, top = number % columns * 16, number // columns * 16
        crop = np.asarray(resized.crop((left, top, left + 16, top + 16)))
        assert (tile == crop.transpose(2, 0, 1)).all()


def test_one_tile_has_no_thumbnail() -> None:
    tiling = TilingSettings(tile_size=4)
    assert num_tiles(999, 3, tiling) == 1
    assert cut_tiles(Image.new("RGB", (99, 3)), tiling).shape == (1, 3, 4, 4)


def test_other_modes_are_refused() -> None:
    with pytest.raises(ValueError, match="got mode L"):
        cut_tiles(Image.new("L", (4, 4)), TilingSettings(tile_size=4))


@pytest.mark.parametrize(
    "wrong",
    [{"min_tiles": 3, "max_tiles": 2}, {"tile_size": 0}, {"min_tiles": 0}, {"max_tile": 4}],
)
def test_wrong_settings_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        TilingSettings(**wrong)


def test_many_images_are_counted_in_slices_of_memory() -> None:
    sizes = np.random.default_rng(0).integers(1, 3000, (2, 100_000))
    tiling = TilingSettings(max_tiles=40)
    tracemalloc.start()
    counts = count_tiles(sizes[0], sizes[1], tiling)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16e6  # all at once would be 126 candidate grids x 0.8 MB, several times
    assert counts[::997].tolist() == [num_tiles(*size, tiling) for size in sizes.T[::997].tolist()]
