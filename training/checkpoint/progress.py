"""Where a run stands: its step, its place in the data, its random number generators."""

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from data_pipeline.plan import PlanState


@dataclass(frozen=True)
class Progress:
    """Where a run stands: optimizer steps done, and the place in the plan to go on from."""

    step: int = 0
    plan: PlanState = field(default_factory=PlanState)


def rng_state() -> dict[str, Any]:
    """This rank's random number generators: python, numpy, torch, and the GPU's."""
    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_rng(state: dict[str, Any]) -> None:
    """The inverse of `rng_state`."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def new_rng_state(seed: int, step: int, rank: int) -> dict[str, Any]:
    """Random states for a rank that has none of its own, in the form of `rng_state`."""
    seeds = np.random.SeedSequence([seed, step, rank]).generate_state(4)
    state = {
        "python": random.Random(int(seeds[0])).getstate(),
        "numpy": np.random.RandomState(seeds[1]).get_state(),
        "torch": torch.Generator().manual_seed(int(seeds[2])).get_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.Generator("cuda").manual_seed(int(seeds[3])).get_state()
    return state
