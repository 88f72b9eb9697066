"""Loading a verified checkpoint, to resume from it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed

from data_pipeline.errors import InputError
from data_pipeline.plan import PlanState
from training.checkpoint.folder_layout import Manifest, read_manifest
from training.checkpoint.progress import Progress, new_rng_state, restore_rng
from training.distributed import from_main
from training.engine_interface import Engine

ChangePlan = Callable[[PlanState, dict[str, Any]], PlanState | None]
"""(place in the data, saved fingerprints) -> the place to go on from in other data, or None."""


def load(
    engine: Engine, path: Path, fingerprints: dict[str, Any], change_plan: ChangePlan | None = None
) -> Progress:
    """Load a checkpoint that `find` returned into the engine, and restore this rank's RNG.

    Every rank calls this; another number of ranks may have saved it. See `place_of` for the
    arguments and errors.

    Args:
        engine: fresh, of the model and trained modules that were saved.
    """
    manifest = from_main(lambda: read_manifest(path))
    plan = place_of(manifest, path, fingerprints, change_plan)
    rng = engine.load(path, manifest.world_size, manifest.frozen)
    if rng is None:
        seed, rank = manifest.fingerprints["seed"], torch.distributed.get_rank()
        rng = new_rng_state(seed, manifest.step, rank)
    restore_rng(rng)
    return Progress(manifest.step, plan)


def place_of(
    manifest: Manifest,
    path: Path,
    fingerprints: dict[str, Any],
    change_plan: ChangePlan | None = None,
) -> PlanState:
    """Where a run goes on from in its data after the checkpoint `path`.

    Args:
        fingerprints: of this run.
        change_plan: asked where only the data, or settings of their order, differ.

    Raises:
        InputError: if it was saved from other data or settings that decide the order of samples,
            and may not go on with these; the message says what differs.
    """
    plan = PlanState.from_dict(manifest.plan)
    changed = setting_changes(manifest.fingerprints, fingerprints)
    if not changed:
        return plan
    of_data = all(
        change.startswith(("data", "seed:")) and not change.startswith("data.tokenizer:")
        for change in changed
    )
    moved = change_plan(plan, manifest.fingerprints) if of_data and change_plan else None
    if moved is None:
        raise InputError(
            f"{path} belongs to a run with other settings, so its place in the data means "
            f"nothing here; changed: {'; '.join(changed)}. Restore them"
            + (", set data.allow_change=true to begin a new window" if of_data else "")
            + ", or start anew with checkpoint.resume=never and another output_dir"
        )
    return moved


def setting_changes(saved: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """The settings that differ, as `key.sub: saved -> now`."""
    changes = []
    for key in sorted(saved.keys() | now.keys()):
        old, new = saved.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changes += setting_changes(old, new, f"{prefix}{key}.")
        elif old != new:
            changes.append(f"{prefix}{key}: {old!r} -> {new!r}")
    return changes
