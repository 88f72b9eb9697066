"""The learning rate of a run that goes on with another `train.steps` than it was saved with."""

from data_pipeline.errors import InputError
from training.checkpoint import Manifest
from training.config import TrainSettings
from training.parameters import Schedule
from training.run import Run

SETTINGS = ("steps", "schedule", "warmup_fraction", "min_lr_fraction", "decay_fraction")
CHOICES = {
    "stretch": "as if it had been so from the start",
    "constant": "the schedule as it was, then its last rate",
    "decay": "a warm-up from the rate reached, and a decay over the steps left (train.schedule=wsd "
    "stays up until its last steps)",
}


def continued(manifest: Manifest, run: Run) -> Schedule:
    """The schedule to go on with after a checkpoint; says so if it is another from here on.

    Raises:
        InputError: if the settings changed and `train.extend` does not say what that means, or if
            `train.steps` lies behind the checkpoint.
    """
    train, step = run.config.train, manifest.step
    if train.steps < step:
        raise InputError(
            f"train.steps={train.steps} lies behind step {step}, which this run has reached; give "
            f"{step} to end it there, or more"
        )
    fields = manifest.run.get("schedule")
    if fields is None:
        run.say("warning: the checkpoint does not record its schedule; train.steps of now counts")
        return Schedule.of(train)
    saved = Schedule.from_dict(fields)
    if _unchanged(saved, train):
        return saved
    trained = [module for _, module in train.modules if module.train]
    peak = max(each.lr for each in (*trained, *train.adapters.given.values()))
    ways = {how: saved.changed(train, how, step) for how in CHOICES}
    if step == train.steps or _same_rates(saved, ways["stretch"]):
        return ways["stretch"]
    rates = {how: _rates(saved, way, step, peak) for how, way in ways.items()}
    what = f"the schedule changed, {_changes(saved, train)}"
    if train.extend is None:
        choices = "; ".join(f"{how}: {text}, {rates[how]}" for how, text in CHOICES.items())
        raise InputError(f"{what}: choose what follows step {step} with train.extend: {choices}")
    run.say(f"{what}, train.extend={train.extend}: {CHOICES[train.extend]}, {rates[train.extend]}")
    return ways[train.extend]


def _unchanged(saved: Schedule, train: TrainSettings) -> bool:
    """Whether these settings made the saved schedule.

    Raises:
        InputError: if only `train.extend` is another than the one that was followed.
    """
    now = Schedule.of(train)
    same = [getattr(saved, key) == getattr(now, key) for key in SETTINGS]
    if all(same) and train.extend and saved.before and train.extend != saved.how:
        raise InputError(
            f"train.extend={train.extend}, but this run was changed with {saved.how} at step "
            f"{saved.start} and goes on so; restore it, or resume from a checkpoint of before"
        )
    return all(same)


def _changes(saved: Schedule, train: TrainSettings) -> str:
    now = Schedule.of(train)
    return ", ".join(
        f"train.{key} {getattr(saved, key)} -> {getattr(now, key)}"
        for key in SETTINGS
        if getattr(saved, key) != getattr(now, key)
    )


def _same_rates(saved: Schedule, now: Schedule) -> bool:
    """Whether both give every step the same rate, as where it is constant."""
    steps = range(max(saved.steps, now.steps))
    return all(saved.factor(step) == now.factor(step) for step in steps)


def _rates(saved: Schedule, now: Schedule, step: int, peak: float) -> str:
    """The learning rates of the step before, of the next and of the last."""
    before, after, last = saved.factor(step - 1), now.factor(step), now.factor(now.steps - 1)
    return f"lr {before * peak:.2e} -> {after * peak:.2e}, at the end {last * peak:.2e}"
