"""`train.epochs`: how many steps that is, and whether a place in the data is one of that plan."""

from data_pipeline.errors import InputError
from data_pipeline.plan import PlanState, count_steps, same_window
from training.checkpoint import Manifest
from training.distributed import from_main
from training.parameters import Schedule
from training.run import Run


def settle_end(run: Run, manifest: Manifest | None, place: PlanState) -> PlanState:
    """Give the run's config the steps that its epochs are, and the place to go on from.

    Args:
        manifest: of the checkpoint that the run goes on from, at `place`.

    Raises:
        InputError: on every rank, if the end of the plan changed inside of its last window, lies
            behind the place, or is another than `train.steps` says.
    """
    train, step = run.config.train, manifest.step if manifest else 0
    saved = manifest.run.get("settings", {}).get("train", {}) if manifest else {}
    moved = manifest is not None and place != PlanState.from_dict(manifest.plan)
    if manifest and saved.get("epochs") != train.epochs and not moved:
        place = _under_another_end(run, manifest, place, saved.get("epochs"))
    if train.epochs is None:
        return place
    _check_ahead(run, step, place)
    if saved.get("epochs") == train.epochs and not moved:
        steps = saved["steps"]
    else:
        steps = step + from_main(lambda: count_steps(run.planner, place))
    if train.steps not in (0, steps):
        raise InputError(
            f"train.steps={train.steps}, but train.epochs={train.epochs:g} ends after step {steps}:"
            " take one of them out of the config"
        )
    run.say(f"{train.epochs:g} epochs of {_an_epoch(run)} = {steps:,} steps")
    run.config = run.config.model_copy(update={"train": train.model_copy(update={"steps": steps})})
    run.schedule = Schedule.of(run.config.train)
    return place


def _under_another_end(
    run: Run, manifest: Manifest, place: PlanState, epochs: float | None
) -> PlanState:
    """The place, if its window is that of the plan that ended after `epochs`, or a new window."""
    if not place.step or same_window(run.planner, place, epochs):
        return place
    new = run.new_window(place, manifest.fingerprints)
    if new is None:
        raise InputError(
            f"train.epochs {_shown(epochs)} -> {_shown(run.config.train.epochs)}, but step "
            f"{manifest.step} lies inside of a window of the plan that one of them ends in: let "
            f"the run end with train.epochs={_shown(epochs)} and go on from there, resume from an "
            "earlier checkpoint, or set data.allow_change=true to begin a new window"
        )
    return new


def _check_ahead(run: Run, step: int, place: PlanState) -> None:
    """InputError if more was read than all epochs hold."""
    datasets = zip(run.mixture.datasets, run.planner.limits, place.taken, strict=False)
    for dataset, limit, taken in datasets:
        if limit is not None and taken > limit:
            raise InputError(
                f"train.epochs={run.config.train.epochs:g} lies behind step {step}, which this run "
                f"has reached: {taken:,} samples of {dataset.name} were taken, and all epochs are "
                f"{limit:,}; give more, or train.steps={step} to end it there"
            )


def _an_epoch(run: Run) -> str:
    sizes = dict(zip(run.mixture.names, run.mixture.limits(1), strict=True))
    text = f"{sum(size or 0 for size in sizes.values()):,} samples"
    parts = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
    return f"{text} ({parts})" if len(sizes) > 1 else text


def _shown(epochs: float | None) -> str:
    return "null" if epochs is None else f"{epochs:g}"
