"""Memory of a rank by part, on any number of ranks, from steps on fake tensors."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from training.config import LAYERED, RunConfig
from training.estimate.packs import PackShape, covering, fake_inputs
from training.estimate.trial import StepMemory, Trial, fake_trial
from training.parameters import recompute_activations
from training.zero3.fake import join_fake_group, offloaded

SHARDED = ("parameters", "masters", "gradients", "optimizer")
_OF_OPTIMIZER = ("masters", "gradients", "optimizer")
_STEP = "optimizer step"


@dataclass(frozen=True)
class MemoryParts:
    """Bytes of one rank.

    device, host: by kind, at the moment of the device's peak.
    """

    device: Counter[str]
    host: Counter[str]

    @property
    def peak(self) -> int:
        """Of the device."""
        return sum(self.device.values())


@dataclass(frozen=True)
class MemoryModel:
    """What the steps have shown.

    resident: by kind on `ranks` ranks, between steps. within: above that while a pack is trained,
    at its peak. update: above that at the peak of the optimizer's step. by_token, by_tile: bytes
    that `within` grows by; None where they were not asked for. other: `within` with activation
    checkpointing of all layers, or of none where all have it; None where it was not tried.
    gathered, reduced: bytes of whole tensors in a pack's collectives. average: whether a moving
    average of the masters is kept, on the host.
    """

    ranks: int
    resident: Counter[str]
    within: Counter[str]
    update: int
    gathered: int
    reduced: int
    offload_optimizer: bool
    offload_params: bool
    by_token: float | None = None
    by_tile: float | None = None
    other: int | None = None
    average: bool = False

    def on(
        self, ranks: int, within: int | None = None, offload_optimizer: bool | None = None
    ) -> MemoryParts:
        """On so many ranks; also with other bytes `within` a pack, or the optimizer offloaded."""
        offload = self.offload_optimizer if offload_optimizer is None else offload_optimizer
        share = self.ranks / ranks
        resident = Counter(
            {k: int(v * share) if k in SHARDED else v for k, v in self.resident.items()}
        )
        away = set(_OF_OPTIMIZER if offload else ()) | set(("parameters",) * self.offload_params)
        host = Counter({kind: resident.pop(kind) for kind in away if kind in resident})
        if self.average:
            host["average"] = int(self.resident["masters"] * share)
        training = Counter(self.within) if within is None else Counter({"activations": within})
        update = 0 if offload else int(self.update * share)
        if update > sum(training.values()):
            training = Counter({_STEP: update})
        return MemoryParts(resident + training, host)


def measure(
    config: RunConfig,
    tokenizer: Any,
    packs: Sequence[PackShape],
    ranks: int,
    on_gpu: bool,
    thorough: bool,
) -> MemoryModel:
    """Train the packs on fake tensors, in this process, which must not be in a group.

    ranks: of the fake group. Two stand for any larger number: what is sharded goes with 1 / ranks,
        all else is the same.
    thorough: each pack by itself, instead of one that covers all; also find what ZeRO-3's
        prefetching takes, how memory goes with tokens and tiles, and what the other way of
        activation checkpointing would take.
    """
    join_fake_group(ranks)
    pack_settings = config.data.pack.model_copy(update={"packs_per_step": ranks})
    data = config.data.model_copy(update={"pack": pack_settings})
    train = config.train.model_copy(update={"ema": None})  # of the host: see `MemoryModel.on`
    tried = config.model_copy(update={"data": data, "train": train})
    with fake_trial(tried, tokenizer, ranks, on_gpu) as trial:
        return _measure(trial, config, tokenizer, packs, ranks, thorough)


def _measure(
    trial: Trial,
    config: RunConfig,
    tokenizer: Any,
    packs: Sequence[PackShape],
    ranks: int,
    thorough: bool,
) -> MemoryModel:
    chunks = -(-config.data.pack.max_tokens // config.train.loss_chunk_tokens)
    image_token = tokenizer.special_id("<IMG_CONTEXT>")

    def step(pack: PackShape) -> StepMemory:
        inputs = fake_inputs(pack, config.data.tiling.tile_size, image_token, chunks)
        return trial.step([inputs])

    packs = packs if thorough else [covering(packs)]
    seen = [step(pack) for pack in packs]
    if thorough:  # now the order of modules is known
        seen = [step(pack) for pack in packs]
    largest = max(seen, key=lambda memory: _above(memory).total())
    fields: dict[str, Any] = {}
    if thorough:
        widest = packs[seen.index(largest)]
        fields["by_token"], fields["by_tile"] = _slopes(widest, _above(largest).total(), step)
        _switch_checkpointing(trial, config.train.recomputed)
        fields["other"] = _above(step(widest)).total()
    resident = trial.resident()
    return MemoryModel(
        ranks,
        resident,
        _above(largest),
        # The first step makes the optimizer's state, which is there for good.
        max(0, seen[-1].peaks[_STEP] - max(resident.total(), seen[-1].resident.total())),
        largest.gathered,
        largest.reduced,
        *offloaded(config),
        average=config.train.ema is not None,
        **fields,
    )


def _above(memory: StepMemory) -> Counter[str]:
    """What a pack takes at its peak above what is resident, by kind."""
    return memory.at_peak - memory.resident


def _slopes(pack: PackShape, bytes_now: int, step: Any) -> tuple[float, float]:
    """Bytes that a token and a tile more take, from packs of half as many."""
    fewer = PackShape(pack.lengths, pack.sides[: pack.tiles // 2], pack.supervised)
    by_tile = 0.0
    if pack.tiles:
        by_tile = (bytes_now - _above(step(fewer)).total()) / (pack.tiles - fewer.tiles)
    halves = tuple(max(1, length // 2) for length in pack.lengths)
    half = PackShape(halves, fewer.sides, max(1, pack.supervised // 2))
    lost = bytes_now - _above(step(half)).total()
    by_token = (lost - by_tile * (pack.tiles - half.tiles)) / max(1, pack.tokens - half.tokens)
    return max(0.0, by_token), max(0.0, by_tile)


def _switch_checkpointing(trial: Trial, recomputed: tuple[str, ...]) -> None:
    recompute_activations(trial.engine.module, () if recomputed == LAYERED else LAYERED)
