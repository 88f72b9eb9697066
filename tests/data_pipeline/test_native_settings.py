"""Limits of patches and budgets of tokens: what is refused, and what is drawn."""

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from data_pipeline.draw import uniform_hash
from data_pipeline.native_settings import BudgetSettings, PatchSettings, draw_budgets

LIST: dict[str, Any] = {"budgets": [576, 64, 144, 256], "probabilities": [0.4, 0.1, 0.2, 0.3]}
UNIFORM = uniform_hash(1, "tokens", np.arange(200_000))


@pytest.mark.parametrize(
    ("kind", "given", "named"),
    [
        (PatchSettings, {"max": 0}, "max 0; .*at least 1"),
        (PatchSettings, {"min": 0}, "min is 0"),
        (PatchSettings, {"max": 64, "min": 65}, "min is 65 and data.patches.max 64"),
        (BudgetSettings, {"budgets": []}, r"budgets \[\] must name at least one"),
        (BudgetSettings, {"budgets": [64, 0]}, r"\[64, 0\].* 1 or more"),
        (BudgetSettings, {"budgets": [64, 64]}, "a budget twice"),
        (BudgetSettings, LIST | {"probabilities": [1.0]}, "4 budgets but 1 probabilities"),
        (
            BudgetSettings,
            LIST | {"probabilities": [0.4, 0.1, 0.2, 0.2]},
            "sum to 0.9; they must sum to 1",
        ),
        (BudgetSettings, LIST | {"probabilities": [1.4, -0.4, 0, 0]}, "in 0..1"),
        (BudgetSettings, {"budgets": {"min": 0, "max": 64}}, "greater than or equal to 1"),
        (BudgetSettings, {"budgets": {"min": 65, "max": 64}}, "min 65 is above max 64"),
        (BudgetSettings, LIST | {"budgets": {"min": 1, "max": 64}}, "leave them out of a range"),
    ],
)
def test_values_out_of_range_are_named(kind: Any, given: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named) as raised:
        kind(**given)
    assert raised.value.error_count() == 1


def test_budgets_are_drawn_at_their_probabilities() -> None:
    settings = BudgetSettings(**LIST)
    drawn = draw_budgets(settings, UNIFORM)
    for budget, share in zip(LIST["budgets"], LIST["probabilities"], strict=True):
        assert abs((drawn == budget).mean() - share) < 0.005
    assert settings.trained == [64, 144, 256, 576]
    evenly = BudgetSettings(budgets=[9, 3])
    assert draw_budgets(evenly, np.array([0.0, 0.4999, 0.5, 1 - 2**-53])).tolist() == [9, 9, 3, 3]
    never = BudgetSettings(budgets=[9, 3], probabilities=[0, 1])
    assert never.trained == [3] and set(draw_budgets(never, UNIFORM).tolist()) == {3}


def test_a_range_is_drawn_evenly_per_doubling() -> None:
    settings = BudgetSettings(budgets={"min": 16, "max": 1023})  # six doublings
    drawn = draw_budgets(settings, UNIFORM)
    assert drawn.min() == 16 and drawn.max() == 1023 and drawn.dtype == np.int64
    for doubling in range(6):
        inside = (drawn >= 16 << doubling) & (drawn < 32 << doubling)
        assert abs(inside.mean() - 1 / 6) < 0.005
    assert (np.diff(draw_budgets(settings, np.sort(UNIFORM))) >= 0).all()
    one = BudgetSettings(budgets={"min": 7, "max": 7})
    assert one.trained == [7] and set(draw_budgets(one, UNIFORM).tolist()) == {7}
    ends = draw_budgets(settings, np.array([0.0, 1 - 2**-53]))
    assert ends.tolist() == [16, 1023]
