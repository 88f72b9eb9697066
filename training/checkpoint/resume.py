"""Loading a verified checkpoint: all of it to resume, or its weights to start a later stage."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed

from data_pipeline.errors import InputError
from data_pipeline.plan import PlanState
from training.checkpoint.find import verify_together
from training.checkpoint.folder_layout import Manifest, finished, read_manifest
from training.checkpoint.progress import Progress, restore_rng
from training.distributed import from_main

ChangePlan = Callable[[PlanState, dict[str, Any]], PlanState | None]
"""(place in the data, saved fingerprints) -> the place to go on from in other data, or None."""


def load(
    engine: Any, path: Path, fingerprints: dict[str, Any], change_plan: ChangePlan | None = None
) -> Progress:
    """Load a checkpoint that `find` returned into a fresh engine, and restore this rank's RNG.

    Every rank calls this; another number of ranks may have saved it.

    Args:
        engine: the DeepSpeed engine.
        path: the checkpoint.
        fingerprints: of this run.
        change_plan: asked where only the data, or settings of their order, differ.

    Raises:
        InputError: if it was saved from other data or settings that decide the order of samples,
            and may not go on with these; the message says what differs.
    """
    manifest = from_main(lambda: read_manifest(path))
    plan = PlanState.from_dict(manifest.plan)
    if changed := _changes(manifest.fingerprints, fingerprints):
        of_data = all(change.startswith(("data", "seed:")) for change in changed)
        moved = change_plan(plan, manifest.fingerprints) if of_data and change_plan else None
        if moved is None:
            raise InputError(
                f"{path} belongs to a run with other settings, so its place in the data means "
                f"nothing here; changed: {'; '.join(changed)}. Restore them"
                + (", set data.allow_change=true to begin a new window" if of_data else "")
                + ", or start anew with checkpoint.resume=never and another output_dir"
            )
        plan = moved
    # DeepSpeed brings back the saved learning rates and the like; the settings of this run count.
    groups = engine.optimizer.param_groups
    options = [{k: v for k, v in group.items() if k != "params"} for group in groups]
    if manifest.world_size == torch.distributed.get_world_size():
        rng = _load_same(engine, path)
    else:
        rng = _load_resharded(engine, path, manifest)
    for group, own in zip(engine.optimizer.param_groups, options, strict=True):
        group.update(own)
    restore_rng(rng)
    return Progress(manifest.step, plan)


def _load_same(engine: Any, path: Path) -> dict[str, Any]:
    loaded, client_state = engine.load_checkpoint(str(path.parent), tag=path.name)
    if loaded is None:
        raise InputError(f"DeepSpeed found no checkpoint in {path}; remove the folder and resume")
    return client_state["rng"]


def _load_resharded(engine: Any, path: Path, manifest: Manifest) -> dict[str, Any]:
    from training.zero3 import elastic

    return elastic.load_resharded(engine, path, manifest)


def start_from(engine: Any, folder: Path) -> Path:
    """Load only the weights of an earlier stage, from a checkpoint or the newest of a folder.

    Optimizer, step and place in the data start anew; any number of ranks may have saved it, and
    other modules may have been frozen. Rank 0 reads the shards. Returns the checkpoint.

    Raises:
        InputError: if there is no finished checkpoint, if it is damaged, or its model is another.
    """
    from deepspeed.runtime.zero import GatheredParameters

    path = from_main(lambda: next(reversed(finished(folder)), folder))
    verify_together(path, "checkpoint.init_from")
    weights: dict[str, Any] = {}  # filled on rank 0 only
    from_main(lambda: weights.update(_read_weights(engine, path)))
    engine.optimizer.checkpoint_event_prologue()
    for prefix, module in engine.module.named_modules():
        if own := dict(module.named_parameters(prefix=prefix, recurse=False)):
            with GatheredParameters(list(own.values()), modifier_rank=0):
                for name in own.keys() & weights.keys():  # on rank 0, all; elsewhere none
                    own[name].data.copy_(weights[name].contiguous())
    engine.optimizer.refresh_fp32_params()
    engine.optimizer.checkpoint_event_epilogue()
    return path


def _read_weights(engine: Any, path: Path) -> dict[str, Any]:
    """Every parameter of the engine's model, read one at a time as it is used."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    # DeepSpeed's own load of weights alone leaves out what it partitions: under ZeRO-3, all.
    weights: dict[str, Any] = get_fp32_state_dict_from_zero_checkpoint(
        str(path.parent), tag=path.name, lazy_mode=True
    )
    for name, parameter in engine.module.named_parameters():
        if name not in weights or tuple(weights[name].shape) != tuple(parameter.ds_shape):
            raise InputError(
                f"checkpoint.init_from={path} has no {name} of shape {tuple(parameter.ds_shape)}, "
                "so it is of another model; take one of this model section"
            )
    return weights


def _changes(saved: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """The settings that differ, as `key.sub: saved -> now`."""
    changes = []
    for key in sorted(saved.keys() | now.keys()):
        old, new = saved.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changes += _changes(old, new, f"{prefix}{key}.")
        elif old != new:
            changes.append(f"{prefix}{key}: {old!r} -> {new!r}")
    return changes
