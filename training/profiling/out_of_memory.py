"""Out of memory: which phase, how much, and what to change, as one error."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from data_pipeline.errors import InputError
from training.config import LAYERED, OFFLOAD_OPTIMIZER, RunConfig
from training.distributed import Ranks
from training.side_outputs import attempt

_ON_CPU = "can't allocate memory"


@contextmanager
def explain_out_of_memory(config: RunConfig, ranks: Ranks) -> Iterator[None]:
    """Turn PyTorch's out-of-memory error into an InputError that says what to change.

    On a GPU the state of its memory is kept in `output_dir`/profile. Starting again would end the
    same way: the plan brings the same packs.
    """
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not isinstance(error, torch.OutOfMemoryError) and _ON_CPU not in str(error):
            raise
        raise InputError(_text(error, config, ranks)) from error


def _text(error: RuntimeError, config: RunConfig, ranks: Ranks) -> str:
    phase = getattr(error, "phase", "startup")
    asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(error))
    text = f"rank {ranks.rank} is out of memory in phase {phase}"
    text += f", where {asked[1]} more were asked for" if asked else ""
    if ranks.device.type == "cuda":
        used, held = (
            read(ranks.device) / 2**30
            for read in (torch.cuda.memory_allocated, torch.cuda.memory_reserved)
        )
        whole = torch.cuda.get_device_properties(ranks.device).total_memory / 2**30
        text += f" ({used:.1f} GiB of {whole:.1f} in use, {held:.1f} held by PyTorch)"
        folder = config.output_dir / "profile"
        snapshot = folder / f"out-of-memory-rank-{ranks.rank}.pickle"
        attempt("no snapshot", lambda: folder.mkdir(parents=True, exist_ok=True))
        attempt("no snapshot", lambda: torch.cuda.memory._dump_snapshot(str(snapshot)))
        text += f"; its memory is in {snapshot}, for pytorch.org/memory_viz"
    return f"{text}. What helps: {'; '.join(remedies(phase, config))}"


def remedies(phase: str, config: RunConfig) -> list[str]:
    """Settings that lower the peak of a phase and are not used yet, the cheapest first."""
    train, pack = config.train, config.data.pack
    recompute = ["train.gradient_checkpointing=true"]
    vision, decoder = (recompute if m not in train.recomputed else [] for m in LAYERED)
    gates = ["train.projector_backward=recompute"] if train.projector_backward == "save" else []
    tiles = [f"a smaller data.pack.max_tiles (now {pack.max_tiles})"]
    tokens = [f"a smaller data.pack.max_tokens (now {pack.max_tokens})"]
    chunks = [f"a smaller train.loss_chunk_tokens (now {train.loss_chunk_tokens})"]
    offload = [] if config.optimizer_on_host else [OFFLOAD_OPTIMIZER]
    state = [*offload, "more ranks, which share parameters and optimizer"]
    found = {
        "vision": [*vision, *tiles],
        "projector": [*gates, *tiles],
        "insert": [*decoder, *tokens],
        "decoder": [*decoder, *tokens],
        "loss": [*chunks, *tokens],
        "backward": [*(vision or decoder), *gates, *chunks, *tokens, *tiles],
        "evaluation": [f"a smaller eval.max_tokens (now {config.eval.max_tokens})"],
    }
    return [*found.get(phase, []), *state]
