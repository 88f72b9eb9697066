"""A place in the plan, as a checkpoint keeps it."""

from dataclasses import dataclass, replace
from typing import Any

from data_pipeline.errors import InputError
from data_pipeline.mixture import Mixture


@dataclass(frozen=True)
class PlanState:
    """Step `step` of window `window` comes next.

    datasets: names; none at the very beginning.
    taken: samples of each that earlier windows took from it, over all its epochs.
    carry: (dataset, epoch, sample) of those that earlier windows took and did not place, the
        dataset as its position in `datasets`, the sample as its number in the dataset's index.
    """

    window: int = 0
    step: int = 0
    datasets: tuple[str, ...] = ()
    taken: tuple[int, ...] = ()
    carry: tuple[tuple[int, int, int], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "window": self.window,
            "step": self.step,
            "datasets": list(self.datasets),
            "taken": list(self.taken),
            "carry": [list(item) for item in self.carry],
        }

    @classmethod
    def from_dict(cls, state: Any) -> "PlanState":
        """The inverse of `to_dict`; InputError if it is not such a dictionary."""
        expected = {"window", "step", "datasets", "taken", "carry"}
        if not isinstance(state, dict) or set(state) != expected:
            found = sorted(state) if isinstance(state, dict) else type(state).__name__
            raise InputError(f"a plan state has the keys {sorted(expected)}, found {found}")
        for key in ("datasets", "taken", "carry"):
            if not isinstance(state[key], list):
                raise InputError(f"{key} of a plan state must be a list, found {state[key]!r}")
        names, carry = state["datasets"], state["carry"]
        if not all(isinstance(name, str) for name in names) or len(names) != len(state["taken"]):
            raise InputError(f"a plan state names its datasets, found {names!r}")
        if not all(isinstance(item, list) and len(item) == 3 for item in carry):
            raise InputError("carry of a plan state holds [dataset, epoch, sample] each")
        flat = [value for item in carry for value in item]
        for value in (state["window"], state["step"], *state["taken"], *flat):
            if type(value) is not int or value < 0:
                raise InputError(f"a plan state holds integers from 0 on, found {value!r}")
        if any(dataset >= len(names) for dataset, _, _ in carry):
            raise InputError(f"a plan state carries samples of none of its datasets {names}")
        carried = tuple((dataset, epoch, sample) for dataset, epoch, sample in carry)
        return cls(state["window"], state["step"], tuple(names), tuple(state["taken"]), carried)

    def moved_to(self, mixture: Mixture, unchanged: frozenset[str]) -> "PlanState":
        """The start of a new window in another mixture.

        Datasets in `unchanged` (same shards as before) go on where the window of this state began,
        with what it was handed over; others begin. What the window had yielded so far comes again.
        """
        taken = dict(zip(self.datasets, self.taken, strict=True))
        number = {name: i for i, name in enumerate(mixture.names)}
        keep = unchanged & set(number)
        return PlanState(
            window=self.window + 1,
            datasets=mixture.names,
            taken=tuple(taken.get(name, 0) if name in keep else 0 for name in mixture.names),
            carry=tuple(
                (number[self.datasets[d]], epoch, sample)
                for d, epoch, sample in self.carry
                if self.datasets[d] in keep
            ),
        )

    def at_step(self, step: int) -> "PlanState":
        """The same window, at another step."""
        return replace(self, step=step)
