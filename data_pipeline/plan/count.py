"""Where a plan ends: after how many steps, and what another end would change."""

from copy import copy

from tqdm import tqdm

from data_pipeline.plan.planner import Planner
from data_pipeline.plan.state import PlanState


def count_steps(planner: Planner, state: PlanState) -> int:
    """Steps from `state` to the end of a plan that ends, found by planning them all."""
    taken = sum(state.taken)
    total = sum(limit or 0 for limit in planner.limits) - taken
    steps = -state.step
    bar = {"desc": "planning all epochs", "unit": " samples", "unit_scale": True}
    with tqdm(total=total, disable=None, leave=False, **bar) as progress:
        for window in planner.windows(state):
            steps += window.num_steps
            progress.update(sum(window.following.taken) - taken - progress.n)
    return steps


def same_window(planner: Planner, state: PlanState, epochs: float | None) -> bool:
    """Whether the window of `state` is the same in the plan that ends after `epochs`."""
    other = copy(planner)
    other.limits = planner.mixture.limits(epochs)
    return _window(planner, state) == _window(other, state)


def _window(planner: Planner, state: PlanState) -> tuple[list[int], bool]:
    """(samples that the window takes from each dataset, whether it is the last)."""
    quotas = planner.quotas(state).tolist()
    ends = zip(planner.limits, state.taken, quotas, strict=True)
    return quotas, all(limit is not None and t + q >= limit for limit, t, q in ends)
