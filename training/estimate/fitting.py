"""What fits into a GPU's memory, and what would make a config fit."""

from dataclasses import dataclass

from training.config import LAYERED, RunConfig
from training.estimate.rank_memory import MemoryModel
from training.estimate.speed import Cluster
from training.zero3.fake import OFFLOAD_OPTIMIZER

RESERVED = 2.5e9
"""Bytes of a GPU that no tensor gets: context, NCCL's buffers, fragments. Assumed."""


def room(cluster: Cluster) -> float:
    """Bytes of a GPU that tensors may take."""
    return cluster.gpu.memory_gb * 1e9 - RESERVED


@dataclass(frozen=True)
class LargestPack:
    """The largest max_tokens with as many tiles as now, and the largest max_tiles; 0: none fits."""

    max_tokens: int
    max_tiles: int


def largest_that_fits(
    memory: MemoryModel, cluster: Cluster, tokens: int, tiles: int
) -> LargestPack | None:
    """From a pack of so many tokens and tiles; None where growth was not measured."""
    if memory.by_token is None or memory.by_tile is None:
        return None
    free = room(cluster) - memory.on(cluster.ranks).peak
    more_tokens = free / memory.by_token if memory.by_token else 0
    more_tiles = free / memory.by_tile if memory.by_tile else 0
    return LargestPack(max(0, int(tokens + more_tokens)), max(0, int(tiles + more_tiles)))


def remedies(memory: MemoryModel, config: RunConfig, cluster: Cluster) -> list[str]:
    """Changes of which each alone would make the config fit."""
    ranks, fits = cluster.ranks, room(cluster)
    within = memory.within.total()
    less = None if config.train.recomputed == LAYERED else memory.other
    recompute, offload = "train.gradient_checkpointing=true", OFFLOAD_OPTIMIZER
    found = []
    if less is not None and memory.on(ranks, less).peak <= fits:
        found.append(recompute)
    if not memory.offload_optimizer and memory.on(ranks, within, True).peak <= fits:
        found.append(offload)
    if less is not None and not found and memory.on(ranks, less, True).peak <= fits:
        found.append(f"{recompute} with {offload}")
    pack = config.data.pack
    for part in (2, 4, 8):
        if memory.on(ranks, within // part).peak <= fits:
            text = f"data.pack.max_tokens={pack.max_tokens // part}"
            tiles = f" and max_tiles={pack.max_tiles // part}" if pack.max_tiles else ""
            found.append(text + tiles)
            break
    for more in (2, 4, 8, 16, 32, 64):
        if memory.on(ranks * more).peak <= fits and pack.packs_per_step % (ranks * more) == 0:
            found.append(f"{ranks * more} GPUs")
            break
    return found
