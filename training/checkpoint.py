"""Sharded checkpoints around DeepSpeed's: written aside, published by rename, found on resume.

Layout: `DIR/step-00000100/` holds DeepSpeed's shards (one per rank) and `meta.json`, which is
written last; `DIR/latest` names the newest. A folder without `meta.json` was never finished.
"""

import json
import os
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed

from data_pipeline.errors import InputError
from data_pipeline.files import write_atomically
from data_pipeline.plan import PlanState
from training.distributed import from_main

TEMPORARY = "tmp-"
META = "meta.json"


@dataclass(frozen=True)
class Progress:
    """Where a run stands: optimizer steps done, and the place in the plan to go on from."""

    step: int = 0
    plan: PlanState = field(default_factory=PlanState)


def save(
    engine: Any, folder: Path, progress: Progress, fingerprints: dict[str, Any], keep: int
) -> Path:
    """Save model, optimizer, RNG and plan position of all ranks; returns the checkpoint's folder.

    Every rank must call this. Readers see the whole checkpoint or none of it.
    """
    name = _name(progress.step)
    temporary, final = folder / (TEMPORARY + name), folder / name
    is_main = torch.distributed.get_rank() == 0
    if is_main:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(TEMPORARY + "*"):
            shutil.rmtree(leftover)
    torch.distributed.barrier()
    engine.save_checkpoint(
        str(folder), tag=temporary.name, client_state={"rng": _rng_state()}, save_latest=False
    )
    torch.distributed.barrier()  # every rank's shard is written
    if is_main:
        meta = {
            "step": progress.step,
            "plan": progress.plan.to_dict(),
            "world_size": torch.distributed.get_world_size(),
            "fingerprints": fingerprints,
        }
        (temporary / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")
        _sync(temporary)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        write_atomically(folder / "latest", name.encode())
        for old in finished(folder)[:-keep]:
            shutil.rmtree(old)
    torch.distributed.barrier()
    return final


def finished(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step-*/{META}"))


def _newest(folder: Path) -> Path | None:
    complete = finished(folder)
    return complete[-1] if complete else None


def find(resume: str, folder: Path) -> Path | None:
    """The checkpoint that `checkpoint.resume` (auto, never, or a folder) means, None to start anew.

    Raises:
        InputError: if a folder was named that is not a finished checkpoint.
    """
    if resume == "never":
        return None
    if resume == "auto":
        return _newest(folder)
    return _named("checkpoint.resume", Path(resume))


def start_from(engine: Any, folder: Path) -> Path:
    """Load only the weights of an earlier stage, from a checkpoint or the newest of a folder.

    Optimizer, step and place in the data start anew; any number of ranks may have saved it, and
    other modules may have been frozen. Rank 0 reads the shards. Returns the checkpoint.

    Raises:
        InputError: if there is no finished checkpoint, or its model is another one.
    """
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    # DeepSpeed's own load of weights alone leaves out what it partitions: under ZeRO-3, all.
    weights: dict[str, Any] = {}

    def read_and_check() -> Path:
        path = _newest(folder) or _named("checkpoint.init_from", folder)
        weights.update(
            get_fp32_state_dict_from_zero_checkpoint(
                str(path.parent), tag=path.name, lazy_mode=True
            )
        )
        for name, parameter in engine.module.named_parameters():
            if name not in weights or tuple(weights[name].shape) != tuple(parameter.ds_shape):
                raise InputError(
                    f"checkpoint.init_from={folder}: {path.name} has no {name} of shape "
                    f"{tuple(parameter.ds_shape)}, so it is of another model; take one of this "
                    "model section"
                )
        return path

    path = from_main(read_and_check)
    engine.optimizer.checkpoint_event_prologue()
    for prefix, module in engine.module.named_modules():
        if own := dict(module.named_parameters(prefix=prefix, recurse=False)):
            with GatheredParameters(list(own.values()), modifier_rank=0):
                for name in own.keys() & weights.keys():  # on rank 0, all; elsewhere none
                    own[name].data.copy_(weights[name].contiguous())
    engine.optimizer.refresh_fp32_params()
    engine.optimizer.checkpoint_event_epilogue()
    return path


def refuse_later(folder: Path, step: int) -> None:
    """InputError if the folder holds checkpoints after `step`, where a run is about to start.

    They would be taken for newer than this run's own, by pruning and by the next resume.
    """
    later = [path.name for path in finished(folder) if path.name > _name(step)]
    if later:
        raise InputError(
            f"{folder} holds {later[-1]}, later than step {step} where this run starts; remove the "
            "later checkpoints or use another output_dir"
        )


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _named(setting: str, path: Path) -> Path:
    if not (path / META).is_file():
        raise InputError(
            f"{setting}={path}: no finished checkpoint there ({META} is missing); give a folder "
            "like runs/digits/checkpoints/step-00000100"
        )
    return path


def load(engine: Any, path: Path, fingerprints: dict[str, Any]) -> Progress:
    """Load a checkpoint into a fresh engine on every rank and restore this rank's RNG.

    Raises:
        InputError: if it was saved on another number of ranks, or from other data or settings
            that decide the order of samples; the message says what differs.
    """
    meta = _read_meta(path)
    _check_world_size(path, meta)
    if changed := _changes(meta["fingerprints"], fingerprints):
        raise InputError(
            f"{path} belongs to a run with other settings, so its place in the data means nothing "
            f"here; changed: {'; '.join(changed)}. Restore them, or start anew with "
            "checkpoint.resume=never and another output_dir"
        )
    # DeepSpeed brings back the saved learning rates and the like; the settings of this run count.
    groups = engine.optimizer.param_groups
    options = [{k: v for k, v in group.items() if k != "params"} for group in groups]
    loaded, client_state = engine.load_checkpoint(str(path.parent), tag=path.name)
    if loaded is None:
        raise InputError(f"DeepSpeed found no checkpoint in {path}; remove the folder and resume")
    for group, own in zip(engine.optimizer.param_groups, options, strict=True):
        group.update(own)
    _restore_rng(client_state["rng"])
    return Progress(meta["step"], PlanState.from_dict(meta["plan"]))


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        return json.loads((path / META).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path / META} cannot be read ({error}); remove {path} to resume from the one before"
        ) from error


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


def _check_world_size(path: Path, meta: dict[str, Any]) -> None:
    world_size = torch.distributed.get_world_size()
    if meta["world_size"] != world_size:
        raise InputError(
            f"{path} was saved by {meta['world_size']} ranks and this run has {world_size}; start "
            f"{meta['world_size']} ranks, or anew with another output_dir"
        )


def _rng_state() -> dict[str, Any]:
    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_rng(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def _sync(folder: Path) -> None:
    """Flush a folder's files and names to disk, so that the rename never publishes empty ones."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
