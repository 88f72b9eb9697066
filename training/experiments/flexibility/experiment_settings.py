"""The settings of an experiment: its arms, seeds and counts, and the runs they come to."""

import re
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from data_pipeline.config_file import Settings, load_settings
from data_pipeline.errors import InputError
from data_pipeline.paths import FilePath, PathText
from data_pipeline.settings import Seed

Basis = Literal["samples", "compute"]
"""What the arms have in common: the samples they have seen, or the FLOPs they have cost."""


class ArmSettings(Settings):
    """One way to train."""

    draw: dict[int, float] = Field(min_length=1)
    """Tokens per tile that training draws, each with its relative weight."""
    settings: list[str] = Field([])
    """Changes to the base config that make the arm, as key=value."""

    @field_validator("draw")
    @classmethod
    def _squares(cls, draw: dict[int, float]) -> dict[int, float]:
        if wrong := [n for n in draw if n < 1 or isqrt(n) ** 2 != n]:
            raise ValueError(f"{wrong[0]} tokens are no n x n grid; give squares")
        if min(draw.values()) <= 0:
            raise ValueError("weights must be above 0; leave a count out that is not drawn")
        return draw

    @property
    def fixed(self) -> int | None:
        """The count, where there is only one."""
        return next(iter(self.draw)) if len(self.draw) == 1 else None


class TimingSettings(Settings):
    """Short runs of all arms in turn, so that what else the machine does meets all of them."""

    steps: int = Field(40, gt=5)
    rounds: int = Field(3, gt=0)


class ExperimentSettings(Settings):
    """Every arm runs with every seed: the same weights to start from, the same order of samples."""

    out: FilePath
    """Folder of the runs."""
    base: PathText
    """Config of the training that all arms share."""
    settings: list[str] = Field([])
    """Changes to it for all arms, as key=value."""
    seeds: list[Seed] = Field(min_length=1)
    counts: list[int] = Field(min_length=1)
    """Tokens per tile that every run is evaluated at."""
    epochs: float = Field(gt=0)
    """How often each run sees every sample, where the arms are compared at equal samples."""
    samples_per_step: int = Field(gt=0)
    """In the mean: a pack gets as many tokens as that takes in an arm, so all take equal steps."""
    budget: str | None = None
    """The arm whose FLOPs all get, where they are compared at equal compute; null: they are not."""
    ranks: int = Field(1, gt=0)
    """Processes of a run."""
    timing: TimingSettings | None = None
    arms: dict[str, ArmSettings] = Field(min_length=2)

    @model_validator(mode="after")
    def _fits(self) -> "ExperimentSettings":
        for what, values in (("seeds", self.seeds), ("counts", self.counts)):
            if len(set(values)) < len(values):
                raise ValueError(f"{what} {values} names one twice")
        folders = [folder_name(name) for name in self.arms]
        if len(set(folders)) < len(folders):
            raise ValueError(f"arms of the same folder {sorted(folders)}; tell their names apart")
        for name, arm in self.arms.items():
            if missing := sorted(arm.draw.keys() - set(self.counts)):
                raise ValueError(
                    f"arms.{name} draws {missing}, which counts leaves out: every drawn count is "
                    "evaluated"
                )
        if self.budget is not None and self.budget not in self.arms:
            raise ValueError(f"budget is {self.budget!r}; expected one of {', '.join(self.arms)}")
        return self

    @property
    def runs(self) -> list["ArmRun"]:
        """All of them, those at equal samples first: the others need to know what they cost."""
        bases: list[Basis] = ["samples", "compute"] if self.budget else ["samples"]
        return [
            ArmRun(arm, seed, basis)
            for basis in bases
            for seed in self.seeds
            for arm in self.arms
            if basis == "samples" or arm != self.budget  # the budget's own run is both
        ]


@dataclass(frozen=True)
class ArmRun:
    """A run of the trainer."""

    arm: str
    seed: int
    basis: Basis

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return f"{folder_name(self.arm)}-seed{self.seed}" + "-compute" * (self.basis == "compute")

    def __str__(self) -> str:
        return f"{self.arm}, seed {self.seed}, equal {self.basis}"


def folder_name(arm: str) -> str:
    """An arm's name as a part of a path."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", arm).strip("-")


def load_experiment(path: Path) -> ExperimentSettings:
    """Read and check an experiment's YAML file; InputError with every problem."""
    experiment = load_settings(ExperimentSettings, path)
    if not Path(experiment.base).is_file():
        raise InputError(f"{path}: base is {experiment.base}, which is not a file")
    return experiment


def arm_overrides(experiment: ExperimentSettings, arm: ArmSettings) -> list[str]:
    """What makes an arm of the base config; counts that are not drawn are evaluated, too."""
    total = sum(arm.draw.values())
    counts = sorted(experiment.counts)
    shares = [arm.draw.get(count, 0) / total for count in counts]
    return [
        *experiment.settings,
        f"data.tokens.counts={counts}",
        f"data.tokens.probabilities={shares}",
        *arm.settings,
    ]
