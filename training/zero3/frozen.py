"""Frozen parameters, which no optimizer holds: where they are, and what they hash to."""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch

from training.distributed import from_main


def frozen_parameters(engine: Any) -> Iterator[tuple[str, Any]]:
    """(name, ZeRO-3 parameter) of all that does not train, in the model's order."""
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            yield name, parameter


def frozen_hashes(engine: Any) -> dict[str, str]:
    """SHA-256 of every frozen parameter's bytes, the same on every rank; every rank calls.

    One parameter is whole at a time. Bytes are in the model's precision.
    """
    from deepspeed.runtime.zero import GatheredParameters

    hashes: dict[str, str] = {}
    is_main = torch.distributed.get_rank() == 0
    engine.optimizer.checkpoint_event_prologue()
    for name, parameter in frozen_parameters(engine):
        with GatheredParameters([parameter]):
            if is_main:
                content = parameter.detach().cpu().contiguous().flatten().view(torch.uint8)
                hashes[name] = hashlib.sha256(content.numpy()).hexdigest()
    engine.optimizer.checkpoint_event_epilogue()
    return from_main(lambda: hashes)
