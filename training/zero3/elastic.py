"""Load a checkpoint on another number of ranks: DeepSpeed's universal format, its gaps filled.

Of a ZeRO-3 checkpoint DeepSpeed's universal loader brings back master weights and Adam's moments
(of which Muon has one).
Silently it shares one Adam step between all sub-groups (each advances it), gives the options of
the first parameter group to every group, and leaves frozen parameters and buffers as they were
initialised. All four are restored here from the checkpoint's own shards and checked after each
load.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch.utils.serialization import config as serialization

from data_pipeline.errors import InputError
from training.distributed import from_main
from training.zero3.frozen import frozen_hashes, frozen_parameters
from training.zero3.shards import MOMENTS, Shards, options_of
from training.zero3.universal import convert_once


def load_resharded(
    engine: Any, path: Path, world_size: int, frozen: dict[str, str]
) -> dict[str, Any] | None:
    """Load a verified checkpoint of any world size into a fresh ZeRO-3 engine; every rank calls.

    The first load for another world size converts the checkpoint, on rank 0 while the others
    wait; later ones reuse what it wrote. Returns this rank's random states, for the caller to
    restore; None where fewer ranks saved.

    Args:
        engine: DeepSpeed's, of the same model, trained modules and precision as those saved.
        path: the checkpoint's folder, its checksums and pickles verified.
        world_size: the number of ranks that saved it.
        frozen: hashes of its frozen parameters; may be empty, and then they are not compared.

    Raises:
        InputError: if it cannot be converted, is of another model, or did not arrive whole.
    """
    if engine.optimizer.swap_optimizer:
        raise InputError(
            f"{path} was saved by {world_size} ranks and the optimizer is offloaded to "
            "NVMe, which cannot be resharded; start as many ranks, or offload to the CPU"
        )
    shards = Shards(path, world_size)
    _check_model(engine, shards)
    folder = from_main(lambda: convert_once(path))
    fused = [bool(g.get("fused") or g.get("capturable")) for g in engine.optimizer.param_groups]
    with _universal_loading(engine):
        loaded, _ = engine.load_checkpoint(str(path), tag=folder.name)
    if loaded is None:
        raise InputError(f"DeepSpeed found no checkpoint in {folder}; remove it and resume again")
    _drop_second_moments(engine, shards)
    _restore_steps(engine, shards, fused)
    _restore_groups(engine, shards)
    _restore_frozen(engine, shards)
    _restore_buffers(engine, shards)
    check(engine, shards, frozen)
    rank = torch.distributed.get_rank()
    return shards.model(rank)["rng"] if rank < world_size else None


@contextmanager
def _universal_loading(engine: Any) -> Iterator[None]:
    """Universal loading for one call, off afterwards: a later load would prefer an old folder.

    Files are mapped, so that a rank reads its own part of every tensor only. That holds for
    parameters whose size divides by the number of ranks; DeepSpeed pads a copy of the others.
    """
    settings = engine._config
    settings.load_universal_checkpoint = True
    try:
        with serialization.patch({"load.mmap": True}):  # type: ignore[attr-defined]
            yield
    finally:
        settings.load_universal_checkpoint = False


def sub_groups(engine: Any) -> Iterator[tuple[int, list[str], torch.Tensor, dict[str, Any]]]:
    """(parameter group, parameter names, flat masters, Adam's state) of every sub-group."""
    optimizer = engine.optimizer
    for number, parameters in enumerate(optimizer.fp16_groups):
        master = optimizer.fp32_partitioned_groups_flat[number]
        names = [optimizer.param_names[parameter] for parameter in parameters]
        state = optimizer.optimizer.state[master]
        yield optimizer.sub_group_to_group_id[number], names, master, state


def _check_model(engine: Any, shards: Shards) -> None:
    """InputError unless exactly the saved parameters train, in their shapes.

    DeepSpeed compares neither: the universal format is flat.
    """
    optimizer = engine.optimizer
    shapes = {
        optimizer.param_names[parameter]: tuple(parameter.ds_shape)
        for parameters in optimizer.fp16_groups
        for parameter in parameters
    }
    saved = shards.shapes()
    for name in sorted(shapes.keys() | saved.keys()):
        if shapes.get(name) != saved.get(name):
            raise InputError(
                f"{shards.path} is of another model: {name} has shape {saved.get(name)} there and "
                f"{shapes.get(name)} here (None: not trained); resume with the settings it was "
                "saved with"
            )


def _drop_second_moments(engine: Any, shards: Shards) -> None:
    """Where the saved optimizer had one moment, the conversion has put zeros for the other."""
    moments = shards.moments()
    for _, names, _, state in sub_groups(engine):
        if len({moments[name] for name in names}) != 1:
            raise InputError(
                f"{shards.path}: {names[0]} and its neighbours were trained by other optimizers "
                "than here; resume with the settings it was saved with"
            )
        for key in set(MOMENTS) - moments[names[0]]:
            state.pop(key, None)


def _restore_steps(engine: Any, shards: Shards, fused: list[bool]) -> None:
    steps = shards.steps()
    for group, names, master, state in sub_groups(engine):
        if len({float(steps[name]) for name in names}) != 1:
            raise InputError(
                f"{shards.path}: Adam's steps of {names[0]} and its neighbours differ, so they "
                "cannot share a sub-group; start as many ranks as saved it"
            )
        # A tensor each: torch advances it in place. Only fused Adam has it on the GPU.
        step = copy.deepcopy(steps[names[0]])
        state["step"] = step.to(master.device) if fused[group] and torch.is_tensor(step) else step


def _restore_groups(engine: Any, shards: Shards) -> None:
    groups, saved = engine.optimizer.param_groups, shards.groups()
    if len(groups) != len(saved):
        raise InputError(
            f"{shards.path} has {len(saved)} parameter groups and this run {len(groups)}; resume "
            "with the settings it was saved with"
        )
    for group, options in zip(groups, saved, strict=True):
        for key in group.keys() - options.keys() - {"params"}:
            del group[key]
        group.update(copy.deepcopy(options))


def _restore_frozen(engine: Any, shards: Shards) -> None:
    """Copy this rank's part of every frozen parameter from the fragments it overlaps."""
    rank = torch.distributed.get_rank()
    engine.optimizer.checkpoint_event_prologue()
    for name, parameter in frozen_parameters(engine):
        target = parameter.ds_tensor.data.flatten()
        size = parameter.ds_numel
        offset, start = 0, min(rank * target.numel(), size)
        stop = min(start + target.numel(), size)
        for piece in shards.frozen(name, size, start, stop):
            target[offset : offset + piece.numel()].copy_(piece)
            offset += piece.numel()
        parameter.ds_tensor.data.copy_(target.view_as(parameter.ds_tensor))
    engine.optimizer.checkpoint_event_epilogue()


def _restore_buffers(engine: Any, shards: Shards) -> None:
    own = shards.own()
    buffers = dict(engine.module.named_buffers())
    for name in own["buffer_names"]:
        saved = own["module"][name]
        if name not in buffers or buffers[name].shape != saved.shape:
            raise InputError(
                f"{shards.path} has a buffer {name} of shape {tuple(saved.shape)} that this model "
                "has not; resume with the settings it was saved with"
            )
        buffers[name].data.copy_(saved)


def check(engine: Any, shards: Shards, hashes: dict[str, str]) -> None:
    """RuntimeError or InputError, naming the parameter, unless everything restored is in place."""
    steps, seen = shards.steps(), set()
    for _, names, master, state in sub_groups(engine):
        step = state["step"]
        if float(step) != float(steps[names[0]]) or (torch.is_tensor(step) and id(step) in seen):
            raise RuntimeError(f"Adam's step of {names[0]} is {step}, not {steps[names[0]]}")
        seen.add(id(step))
        for key in shards.moments()[names[0]]:
            if state[key].shape != master.shape or state[key].device != master.device:
                raise RuntimeError(f"{key} of {names[0]} does not lie beside its master weights")
    for group, options in zip(engine.optimizer.param_groups, shards.groups(), strict=True):
        if options_of(group) != options:
            raise RuntimeError(f"parameter group {options.get('name')}: {options_of(group)}")
    own, buffers = shards.own(), dict(engine.module.named_buffers())
    for name in own["buffer_names"]:
        if not torch.equal(buffers[name].cpu(), own["module"][name]):
            raise RuntimeError(f"buffer {name} is not the saved one")
    if engine.load_universal_checkpoint():
        raise RuntimeError("universal loading is still switched on")
    if not hashes:
        return
    found = frozen_hashes(engine)
    for name in sorted(hashes.keys() | found.keys()):
        if found.get(name) != hashes.get(name):
            raise InputError(
                f"the frozen parameter {name} is not the one the run was started with (SHA-256 "
                f"{found.get(name)}, saved {hashes.get(name)}); resume from an older checkpoint"
            )
