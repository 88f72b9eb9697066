"""What the checkpoint tests run on every rank: small ZeRO-3 engines whose state is known."""

import errno
import os
import statistics
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from data_pipeline.errors import InputError
from data_pipeline.plan import PlanState
from training import checkpoint
from training.checkpoint import publication
from training.config import CheckpointSettings
from training.distributed import Ranks, all_reduce_max
from training.zero3.engine import Zero3Engine

FINGERPRINTS = {"seed": 1}


class Model(torch.nn.Module):
    """A frozen linear map, a buffer, and `layers` trained maps of `width` x `width`."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.frozen = torch.nn.Linear(width, width)
        self.frozen.requires_grad_(False)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(layers))
        self.register_buffer("count", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.frozen(x)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().sum()


def build(width: int = 32, layers: int = 2, seed: int = 0) -> Zero3Engine:
    """A ZeRO-3 engine in fp32 around `Model`."""
    import deepspeed

    torch.manual_seed(seed)
    model = Model(width, layers)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "steps_per_print": 10**9,
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": trained, "name": "all"}], lr=1e-2)
    return Zero3Engine(deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0])


def train(engine: Any, rank: int, steps: int = 1) -> None:
    for _ in range(steps):
        x = torch.randn(4, engine.module.frozen.out_features) + rank
        engine.backward(engine(x), last=True)
        engine.step()


def state(engine: Any) -> list[torch.Tensor]:
    """Copies of this rank's masters, moments, steps, frozen parts and buffers."""
    optimizer = engine.deepspeed.optimizer
    tensors = list(optimizer.fp32_partitioned_groups_flat)
    for values in optimizer.optimizer.state.values():
        tensors += [values["exp_avg"], values["exp_avg_sq"], values["step"]]
    tensors += [p.ds_tensor for p in engine.module.parameters() if not p.requires_grad]
    return [tensor.detach().clone() for tensor in [*tensors, *engine.module.buffers()]]


def fill(engine: Any, value: float) -> None:
    """Set this rank's masters and moments to one value."""
    optimizer = engine.deepspeed.optimizer
    for master in optimizer.fp32_partitioned_groups_flat:
        master.data.fill_(value)
        for key in ("exp_avg", "exp_avg_sq"):
            optimizer.optimizer.state[master][key].fill_(value)


def progress(step: int) -> checkpoint.Progress:
    return checkpoint.Progress(step, PlanState(0, step, ("data",), (step,)))


def settings(**changes: Any) -> CheckpointSettings:
    return CheckpointSettings(**changes)


def save_steps(
    ranks: Ranks, folder: Path, steps: list[int], options: dict[str, Any], wait: bool = False
) -> tuple[str | None, list[torch.Tensor]]:
    """Save at these step numbers, training in between; the newest, and the state saved last.

    A save in the background writes nothing before the next step is done.
    """
    engine, stepped = build(), threading.Event()
    at_once = wait or not options.get("background", True)
    real = publication.write_shards

    def write_late(*args: Any) -> Any:
        assert at_once or stepped.wait(60)
        return real(*args)

    publication.write_shards = write_late
    try:
        with checkpoint.Saver(folder, settings(**options), ranks) as saver:
            saver.check_space(engine)
            train(engine, ranks.rank)
            for step in steps:
                stepped.clear()
                saver.save(engine, progress(step), FINGERPRINTS, wait)
                saved = state(engine)
                train(engine, ranks.rank)  # overwrites the live tensors
                stepped.set()
            newest = saver.wait()
    finally:
        publication.write_shards = real
    return newest.name if newest else None, saved


def resume(
    ranks: Ranks, folder: Path, named: str = "auto"
) -> tuple[str, str | None, dict[str, Any], list[torch.Tensor]]:
    """Find and load: (error, folder found, progress, state); the first is "" where it worked."""
    try:
        path = checkpoint.find(named, folder)
        if path is None:
            return "", None, {}, []
        engine = build(seed=9)
        place = checkpoint.load(engine, path, FINGERPRINTS)
    except InputError as error:
        return str(error), None, {}, []
    return "", path.name, {"step": place.step, "plan": place.plan.to_dict()}, state(engine)


def enter(ranks: Ranks, folder: Path) -> str:
    """What a Saver says on this rank: "entered", or why not."""
    try:
        with checkpoint.Saver(folder, settings(), ranks):
            return "entered"
    except InputError as error:
        return str(error)


def full_disk(
    ranks: Ranks, folder: Path, steps: list[int], failing: list[int], full: int | None
) -> tuple[list[tuple[int, str | None]], str]:
    """Save at these steps; for the failing ones the disk of rank `full` is full.

    Returns (step, error) as known after waiting for each, and the error that ended it, if any.
    """
    real, errors = publication.torch.save, []
    engine = build()
    try:
        with checkpoint.Saver(folder, settings(), ranks) as saver:
            for step in steps:
                train(engine, ranks.rank)
                if step in failing and ranks.rank == full:
                    publication.torch.save = no_space_left
                saver.save(engine, progress(step), FINGERPRINTS)
                saver.wait()
                publication.torch.save = real
                errors.append((step, saver.last_error))
    except InputError as error:
        return errors, str(error)
    finally:
        publication.torch.save = real
    return errors, ""


def refuse_latest(ranks: Ranks, folder: Path) -> list[str | None]:
    """Save four steps where `latest` cannot be written; the error of each."""
    real, errors, engine = publication.write_atomically, [], build()

    def write(path: Path, data: bytes) -> None:
        if path.name == "latest":
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        real(path, data)

    publication.write_atomically = write
    try:
        with checkpoint.Saver(folder, settings(), ranks) as saver:
            for step in range(1, 5):
                saver.save(engine, progress(step), FINGERPRINTS)
                saver.wait()
                errors.append(saver.last_error)
    finally:
        publication.write_atomically = real
    return errors


def no_space_left(state: Any, file: Any) -> None:
    file.write(b"half")
    raise OSError(errno.ENOSPC, "No space left on device")


def no_space(ranks: Ranks, folder: Path) -> str:
    """What a run says at its start that wants to keep more checkpoints than fit."""
    try:
        with checkpoint.Saver(folder, settings(keep=50), ranks) as saver:
            saver.check_space(build())
    except InputError as error:
        return str(error)
    return ""


def with_progress_file(ranks: Ranks, folder: Path, file: Path) -> None:
    os.environ["PROGRESS_FILE"] = str(file)
    try:
        save_steps(ranks, folder, [1, 2], {})
    finally:
        del os.environ["PROGRESS_FILE"]


def save_with_the_disk_held_up(ranks: Ranks, folder: Path) -> tuple[int, str]:
    """How many checkpoints there are when `save` returns and no byte is written; the one later."""
    engine = build()
    train(engine, ranks.rank)
    disk, write = threading.Event(), publication.write_shards

    def write_later(*args: Any) -> Any:
        disk.wait(60)
        return write(*args)

    publication.write_shards = write_later
    try:
        with checkpoint.Saver(folder, settings(), ranks) as saver:
            saver.save(engine, progress(1), FINGERPRINTS)
            before = len(checkpoint.finished(folder))
            torch.distributed.barrier()
            disk.set()
            published = saver.wait()
    finally:
        publication.write_shards = write
    return before, published.name if published else ""


def stalls(ranks: Ranks, folder: Path, width: int, trials: int = 3) -> tuple[float, float]:
    """Median seconds of a background save's stall and of a synchronous save."""
    engine = build(width)
    train(engine, ranks.rank)
    medians = []
    for background in (True, False):
        seconds = []
        place = folder / ("background" if background else "synchronous")
        with checkpoint.Saver(place, settings(background=background), ranks) as saver:
            for step in range(1, trials + 2):
                torch.distributed.barrier()
                saver.save(engine, progress(step), FINGERPRINTS)
                seconds.append(saver.stall_s)
                saver.wait()
        slowest = all_reduce_max(seconds[1:], ranks.device)  # the first allocates
        medians.append(statistics.median(slowest))
    return medians[0], medians[1]
