"""The comparison as a picture: samples/s of every round, and loss by samples trained."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.plotting import picture


def plot(found: Mapping[str, Any], out: Path) -> None:
    """Draw what `compare` found; InputError if `out` cannot be written."""
    arms = found["arms"]
    with picture(out, (11, 4), columns=2) as (_, (rates, losses)):
        for place, (name, arm) in enumerate(arms.items()):
            spread = arm["samples_per_s"]
            rates.bar(place, spread["median"], color=f"C{place}")
            rates.plot([place] * len(spread["rounds"]), spread["rounds"], "k.", markersize=4)
            rates.text(place, spread["median"] / 2, f"{spread['median']:.3g}", ha="center")
            losses.plot(arm["curve"]["samples"], arm["curve"]["loss"], label=name)
        rates.set_xticks(range(len(arms)), list(arms))
        rates.set_ylabel("samples/s (bar: median, dots: rounds)")
        losses.set_xlabel("samples trained")
        losses.set_ylabel("loss of the step")
        losses.legend()
