"""Addressed randomness: values that any process reproduces, and the settings of token counts."""

import hashlib

import numpy as np
import pytest
from pydantic import ValidationError

from data_pipeline.draw import TokenCountSettings, draw_sides, uniform_hash

WORD = (1 << 64) - 1


def splitmix_reference(seed: int, purpose: str, *columns: int) -> float:
    """The same definition in Python's integers, which neither overflow nor wrap."""
    state = int.from_bytes(hashlib.sha256(f"{seed}:{purpose}".encode()).digest()[:8], "little")
    for column in columns:
        x = (state + (column + 1) * 0x9E3779B97F4A7C15) & WORD
        x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & WORD
        x = ((x ^ x >> 27) * 0x94D049BB133111EB) & WORD
        state = x ^ x >> 31
    return (state >> 11) / 2**53


def test_hash_has_these_values_in_every_process() -> None:
    values = uniform_hash(0, "tokens", 3, np.array([0, 1, 2**40]))
    assert values.tolist() == GOLDEN
    assert float(uniform_hash(-7, "order")) == splitmix_reference(-7, "order")


@pytest.mark.parametrize("columns", [(5,), (0, 17), (-1, 2**63), (1, 2, 3)])
def test_hash_agrees_with_its_definition(columns: tuple[int, ...]) -> None:
    assert float(uniform_hash(11, "x", *columns)) == splitmix_reference(11, "x", *columns)


def test_hash_broadcasts_its_columns() -> None:
    epochs, samples = np.arange(3)[:, None], np.arange(5, dtype=np.int32)
    grid = uniform_hash(1, "x", epochs, samples)
    assert grid.shape == (3, 5)
    assert all(grid[e, s] == uniform_hash(1, "x", e, s) for e in range(3) for s in range(5))


def test_hash_depends_on_every_part_of_its_address() -> None:
    samples = np.arange(1000)
    streams = [
        uniform_hash(0, "order", 0, samples),
        uniform_hash(1, "order", 0, samples),
        uniform_hash(0, "tokens", 0, samples),
        uniform_hash(0, "order", 1, samples),
        uniform_hash(0, "order", samples, 2000),
        uniform_hash(0, "order", 0, samples, 0),
    ]
    for i, first in enumerate(streams):
        for second in streams[:i]:
            assert not np.isin(first, second).any()
            assert abs(np.corrcoef(first, second)[0, 1]) < 0.1


@pytest.mark.parametrize("axis", [0, 1])
def test_hash_is_uniform_and_its_neighbours_are_independent(axis: int) -> None:
    address = (np.arange(100_000), 3) if axis == 0 else (3, np.arange(100_000))
    values = uniform_hash(5, "x", *address)
    assert values.min() >= 0 and values.max() < 1
    observed = np.bincount((values * 100).astype(int), minlength=100)
    chi_square = ((observed - 1000) ** 2 / 1000).sum()
    assert 60 < chi_square < 150  # 99 degrees of freedom: 3.5 standard deviations
    for lag in (1, 2, 64):
        assert abs(np.corrcoef(values[lag:], values[:-lag])[0, 1]) < 0.015


def test_sides_follow_the_probabilities() -> None:
    settings = TokenCountSettings()
    sides = draw_sides(settings, uniform_hash(0, "tokens", 0, np.arange(100_000)))
    shares = [np.mean(sides == side) for side in (8, 12, 16)]
    assert shares == pytest.approx([0.2, 0.3, 0.5], abs=0.005)


def test_a_count_of_probability_zero_is_never_drawn() -> None:
    settings = TokenCountSettings(counts=[4, 9, 16, 25], probabilities=[0, 0.5, 0.5, 0])
    edges = np.array([0.0, 0.25, np.nextafter(0.5, 0), 0.5, np.nextafter(1.0, 0)])
    assert draw_sides(settings, edges).tolist() == [3, 3, 3, 4, 4]
    assert settings.sides == [2, 3, 4, 5]
    assert settings.trained_sides == [3, 4]


def test_probabilities_a_little_below_one_leave_no_gap() -> None:
    settings = TokenCountSettings(counts=[4, 9], probabilities=[0.5, 0.4999995])
    assert draw_sides(settings, np.array([np.nextafter(1.0, 0)])).tolist() == [3]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"counts": [64, 150, 256]}, "150 is not a perfect square; the nearest is 144 or 169"),
        ({"counts": [0, 4, 9]}, "count 0 is not a perfect square; the nearest is 1"),
        ({"counts": [-4, 4, 9]}, "count -4 is not a perfect square; the nearest is 1"),
        ({"counts": [64, 64, 256]}, "names a count twice"),
        ({"counts": [64, 256]}, "2 counts but 3 probabilities"),
        ({"counts": []}, "at least 1 item"),
        ({"probabilities": [0.2, 0.3, 0.4]}, "sum to 0.9"),
        ({"probabilities": [-0.1, 0.6, 0.5]}, "must each lie in 0..1"),
        ({"probabilities": [float("nan"), 0.5, 0.5]}, "finite"),
        ({"draw": "tile"}, "'image', 'sample' or 'pack'"),
        ({"count": [64]}, "Extra inputs are not permitted"),
    ],
)
def test_wrong_settings_say_what_is_wrong(settings: dict, message: str) -> None:
    with pytest.raises(ValidationError) as error:
        TokenCountSettings(**settings)
    assert message in str(error.value)


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(ValidationError) as error:
        TokenCountSettings(counts=[63, 150], probabilities=[0.2, 0.2])
    for part in ("count 63", "count 150", "sum to 0.4"):
        assert part in str(error.value)


# Changing one of these changes the order and the counts of every run that was ever planned.
GOLDEN = [0.3715476900011506, 0.2627736183795246, 0.7515445003793542]
