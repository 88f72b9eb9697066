"""How many patches an image has at its own aspect ratio, and under which budget its tokens stay.

The shapes that follow are those of `data_pipeline.processor.native_shapes_tokenflex`. Not yet part
of the settings of a run: the planner makes square tiles.
"""

import math
from functools import lru_cache
from typing import Annotated

import numpy as np
from pydantic import Discriminator, Field, Tag, model_validator

from data_pipeline.config_file import Settings
from data_pipeline.draw import choice_problems, choose
from data_pipeline.processor.native_shapes_tokenflex import check_patches

# Logarithms differ in their last bits from machine to machine; a draw must not.
_GRID = 2.0**30


class PatchSettings(Settings):
    """Limits of an image's patches."""

    max: int = 1024
    """Larger images are made smaller until they have no more."""
    min: int = 1
    """Smaller images are enlarged to as many, as far as their aspect ratio allows."""

    @model_validator(mode="after")
    def _check_order(self) -> "PatchSettings":
        check_patches(1, self.max, self.min)
        return self


class BudgetRange(Settings):
    """All whole numbers from min to max; each doubling is as likely as any other."""

    min: int = Field(ge=1)
    max: int = Field(ge=1)

    @model_validator(mode="after")
    def _check_order(self) -> "BudgetRange":
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}; give the smaller one as min")
        return self


class BudgetSettings(Settings):
    """Most tokens an image gets, drawn from some budgets or from a range."""

    budgets: Annotated[
        Annotated[list[int], Tag("list")] | Annotated[BudgetRange, Tag("range")],
        Discriminator(lambda given: "range" if isinstance(given, dict | BudgetRange) else "list"),
    ]
    probabilities: list[float] | None = None
    """Of each budget in a list; null: all the same."""

    @model_validator(mode="after")
    def _check(self) -> "BudgetSettings":
        if isinstance(self.budgets, BudgetRange):
            if self.probabilities is not None:
                raise ValueError(
                    "probabilities are of a list of budgets; leave them out of a range"
                )
            return self
        if not self.budgets or min(self.budgets) < 1:
            raise ValueError(
                f"budgets {self.budgets} must name at least one, each 1 or more tokens"
            )
        if problems := choice_problems("budget", self.budgets, self.probabilities):
            raise ValueError("; ".join(problems))
        return self

    @property
    def trained(self) -> list[int]:
        """The budgets that can be drawn, ascending."""
        if isinstance(self.budgets, BudgetRange):
            return list(range(self.budgets.min, self.budgets.max + 1))
        given = self.probabilities or [1.0] * len(self.budgets)
        return sorted(b for b, p in zip(self.budgets, given, strict=True) if p > 0)


def draw_budgets(settings: BudgetSettings, uniform: np.ndarray) -> np.ndarray:
    """Turn uniform values in [0, 1) into budgets, int64 of the same shape."""
    if isinstance(settings.budgets, BudgetRange):
        least, most = settings.budgets.min, settings.budgets.max
        return least + np.searchsorted(_ends_of_range(least, most), uniform, side="right")
    given = settings.probabilities or [1.0] * len(settings.budgets)
    return choose(settings.budgets, given, uniform)


@lru_cache(maxsize=8)
def _ends_of_range(least: int, most: int) -> np.ndarray:
    """Below which value each budget but the last of a range is drawn: log((b + 1) / least)."""
    whole = math.log((most + 1) / least)
    ends = [math.log((budget + 1) / least) / whole for budget in range(least, most)]
    return np.round(np.array(ends) * _GRID) / _GRID
