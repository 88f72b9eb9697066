"""What may change between the starts of a run, setting by setting, and what changed at this one."""

from pathlib import Path
from typing import Any

from data_pipeline.errors import InputError
from training import checkpoint
from training.checkpoint import Manifest
from training.config import RunConfig
from training.run import Run

REFUSED = "refused"
WINDOW = "refused, or a new window"
SCHEDULE = "train.extend chooses"
ORIGIN = "refused, null goes on"
FIRST = "at the first start"
HERE = "from here on"

# What a changed setting does on resume; the longest key that a setting begins with decides.
# docs/settings.md is this table with its reasons.
ON_RESUME = {
    "output_dir": FIRST,
    "seed": WINDOW,
    "data": WINDOW,
    "data.eval_shards": HERE,
    "data.index_dir": HERE,
    "data.tokenizer": REFUSED,
    "data.prepare": REFUSED,
    "data.allow_change": HERE,
    "data.loader": HERE,
    "data.storage": HERE,
    "model": REFUSED,
    "model.projector": REFUSED,
    "model.pretrained": ORIGIN,
    "model.vision.pretrained": ORIGIN,
    "model.llm.pretrained": ORIGIN,
    "train": HERE,
    "train.steps": SCHEDULE,
    "train.epochs": SCHEDULE,
    "train.warmup_fraction": SCHEDULE,
    "train.min_lr_fraction": SCHEDULE,
    "train.schedule": SCHEDULE,
    "train.decay_fraction": SCHEDULE,
    "train.extend": SCHEDULE,
    "train.modules.vision_model.train": REFUSED,
    "train.modules.vision_model.layer_decay": REFUSED,
    "train.modules.projector.train": REFUSED,
    "train.modules.language_model.train": REFUSED,
    "train.decoder_impl": HERE,
    "train.compile_layers": HERE,
    "train.flash_attention": HERE,
    "train.adapters": REFUSED,
    "train.adapters.vision_model.lr": HERE,
    "train.adapters.vision_model.dropout": HERE,
    "train.adapters.projector.lr": HERE,
    "train.adapters.language_model.lr": HERE,
    "train.adapters.language_model.dropout": HERE,
    "train.optimizer": REFUSED,
    "train.optimizer.momentum": HERE,
    "train.ema": HERE,
    "train.precision": REFUSED,
    "deepspeed": HERE,
    "checkpoint": HERE,
    "checkpoint.resume": FIRST,
    "checkpoint.init_from": ORIGIN,
    "checkpoint.init_allow": FIRST,
    "faults": HERE,
    "eval": HERE,
    "profile": HERE,
    "metrics": HERE,
}
ORIGINS = [key for key, rule in ON_RESUME.items() if rule == ORIGIN]


def rule_of(setting: str) -> str:
    """What the table says of a setting, as train.steps."""
    parts = setting.split(".")
    keys = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next(ON_RESUME[key] for key in keys if key in ON_RESUME)


def describe_changes(manifest: Manifest, config: RunConfig, path: Path) -> str:
    """The settings that are not those of the checkpoint, a line each."""
    saved = manifest.run.get("settings")
    if saved is None:
        return f"{path.name} does not record its settings: what differs from them is not known"
    changes = checkpoint.setting_changes(saved, config.model_dump(mode="json"))
    lines = [f"  {text} ({rule_of(text.split(':')[0])})" for text in changes]
    if not lines:
        return f"settings: those of {path.name}"
    return "\n".join([f"settings that differ from those of {path.name}:", *lines])


def origin_of(config: RunConfig, stage: Path | None) -> dict[str, Any]:
    """What a new run begins from: the settings that name it, and the checkpoint's identity."""
    origin: dict[str, Any] = dict(_named(config))
    if stage:
        origin["checkpoint"] = checkpoint.manifest_hash(stage)
    return origin


def check_origin(origin: dict[str, Any] | None, run: Run, saved: Path) -> None:
    """Do the settings name the beginning that the checkpoint goes back to, or none?

    Raises:
        InputError: if they name another, which would be passed over in silence.
    """
    named = _named(run.config)
    if origin is None:
        if "checkpoint.init_from" in named:
            run.say(f"warning: {saved} does not record what it began from; it wins over init_from")
        return
    for key, value in named.items():
        if not _same_place(origin.get(key), value) and not _same_checkpoint(origin, key, value):
            began = origin.get(key) or "other weights"
            raise InputError(
                f"{key}={value}, but {saved} belongs to a run that began from {began}, and a "
                f"checkpoint wins over it. Set {key}=null to go on from the checkpoint, or start "
                "from the other weights with another output_dir"
            )


def _named(config: RunConfig) -> dict[str, str]:
    model = config.model
    values = [model.pretrained, model.vision.pretrained, model.llm.pretrained]
    values.append(config.checkpoint.init_from)
    return {key: value for key, value in zip(ORIGINS, values, strict=True) if value}


def _same_place(one: str | None, other: str) -> bool:
    return one is not None and (one == other or Path(one).resolve() == Path(other).resolve())


def _same_checkpoint(origin: dict[str, Any], key: str, value: str) -> bool:
    """Whether `checkpoint.init_from` names that checkpoint by another path."""
    found = checkpoint.checkpoints_at(Path(value)) if key == "checkpoint.init_from" else []
    return bool(found) and origin.get("checkpoint") == checkpoint.manifest_hash(found[0])
