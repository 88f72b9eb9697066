"""Steps of the trainer's engine under a ledger, on fake tensors or real ones."""

import gc
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from data_pipeline.tokenizer import Tokenizer
from training.config import RunConfig
from training.distributed import Ranks
from training.engine_interface import Engine
from training.estimate.ledger import Ledger
from training.model import attention
from training.zero3.engine import build_engine
from training.zero3.fake import around_gathers, offloaded, resident_tensors, without_values


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a rank in one step.

    resident: by kind, between steps. peak: the most at one time. at_peak: by kind, at the peak of
    the forward and backward passes. peaks: the most by phase. gathered, reduced: whole tensors
    that the step's collectives moved.
    """

    resident: Counter[str]
    peak: int
    at_peak: Counter[str]
    peaks: dict[str, int]
    gathered: int
    reduced: int


class Trial:
    """An engine whose steps are measured; see `fake_trial` and `real_trial`."""

    def __init__(self, engine: Engine, ledger: Ledger) -> None:
        self.engine, self.ledger = engine, ledger
        around_gathers(engine, lambda: ledger.during("gathered"))
        model: Any = engine.module
        ledger.follow(model.vision_model, "vision", "projector")
        ledger.follow(model.projector, "projector", "decoder")
        ledger.follow(model.language_model.get_decoder(), "decoder", "loss")

    def resident(self) -> Counter[str]:
        """Bytes by kind that are there between steps."""
        gc.collect()
        for kind, tensor in resident_tensors(self.engine):
            self.ledger.label(tensor, kind)
        return Counter({kind: size for kind, size in self.ledger.totals.items() if size > 0})

    def step(self, packs: Sequence[dict[str, Any]]) -> StepMemory:
        """An optimizer step over packs: arguments of the model's forward."""
        resident, ledger = self.resident(), self.ledger
        ledger.forget()
        for number, inputs in enumerate(packs, start=1):
            with ledger.during("decoder"):
                output = self.engine(**inputs)
                ledger.phase = "backward"
                self.engine.backward(output.loss, last=number == len(packs))
            del output
        at_peak = Counter(ledger.at_peak)
        with ledger.during("optimizer step"):
            self.engine.step()
        return StepMemory(
            resident, ledger.peak, at_peak, ledger.peaks, ledger.gathered, ledger.reduced
        )


@contextmanager
def fake_trial(
    config: RunConfig, tokenizer: Tokenizer, world_size: int, on_gpu: bool
) -> Iterator[Trial]:
    """The engine of a config on fake tensors, as rank 0 of a fake group that was joined before.

    on_gpu: take the ways of a GPU (attention, fused AdamW) instead of a CPU's.
    """
    ledger = Ledger()
    on_host = not on_gpu or offloaded(config)[0]
    device = torch.device("cpu") if on_host else torch.device("cuda", 0)
    ranks = Ranks(0, world_size, 0, device)
    with FakeTensorMode(allow_non_fake_inputs=True), ledger, attention.as_on_gpu(on_gpu):
        with without_values():
            engine = build_engine(config, tokenizer, ranks, pretrained=False)
        yield Trial(engine, ledger)


@contextmanager
def real_trial(config: RunConfig, tokenizer: Tokenizer, ranks: Ranks) -> Iterator[Trial]:
    """The same with real tensors, in the group that this process is in."""
    ledger = Ledger()
    with ledger:
        yield Trial(build_engine(config, tokenizer, ranks, pretrained=False), ledger)
