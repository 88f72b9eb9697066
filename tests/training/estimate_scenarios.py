"""What the estimate is held against: the same steps of the same engine, on real tensors."""

from typing import Any

import torch.distributed

from tests.ranks import forkserver
from training.config import RunConfig, load_config
from training.distributed import Ranks
from training.estimate.packs import PackShape, fake_inputs
from training.estimate.trial import StepMemory, Trial, fake_trial, real_trial

DIGITS = "training/configs/digits.yaml"
IMAGE = 7
STEPS = 2  # ZeRO-3 knows the order of modules, and prefetches, in the second


class Vocabulary:
    """All that an estimate asks of a tokenizer."""

    vocab_size = 400

    def special_id(self, token: str) -> int:
        return IMAGE


def config_of(overrides: list[str]) -> RunConfig:
    fixed = ["train.precision=fp32", "output_dir=unused"]
    return load_config(DIGITS, [*fixed, *overrides])


def last_step(trial: Trial, config: RunConfig, pack: PackShape) -> StepMemory:
    chunks = -(-config.data.pack.max_tokens // config.train.loss_chunk_tokens)
    inputs = fake_inputs(pack, config.data.tiling.tile_size, IMAGE, chunks)
    packs = config.data.pack.packs_per_step // torch.distributed.get_world_size()
    return [trial.step([inputs] * packs) for _ in range(STEPS)][-1]


def measured(ranks: Ranks, overrides: list[str], pack: PackShape) -> StepMemory:
    """On every rank of a group."""
    config = config_of(overrides)
    with real_trial(config, Vocabulary(), ranks) as trial:  # type: ignore[arg-type]
        return last_step(trial, config, pack)


def _estimate(connection: Any, world_size: int, overrides: list[str], pack: PackShape) -> None:
    from training.zero3.fake import join_fake_group
    from training.zero3.process_group import quiet_libraries

    quiet_libraries()
    join_fake_group(world_size)
    config = config_of(overrides)
    with fake_trial(config, Vocabulary(), world_size, on_gpu=False) as trial:  # type: ignore[arg-type]
        connection.send(last_step(trial, config, pack))


def estimated(world_size: int, overrides: list[str], pack: PackShape) -> StepMemory:
    """In a process of its own."""
    context = forkserver()
    ours, theirs = context.Pipe()
    process = context.Process(
        target=_estimate, args=(theirs, world_size, overrides, pack), daemon=True
    )
    process.start()
    theirs.close()
    try:
        found: StepMemory = ours.recv()
    finally:
        process.kill()
        process.join()
    return found
