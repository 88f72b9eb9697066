"""The named parts of a step, as traces, NVTX ranges and out-of-memory errors show them."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch.profiler import record_function

PREFIX = "phase/"
PHASES = (
    *("data", "vision", "projector", "insert", "decoder", "loss", "backward", "metrics"),
    *("optimizer", "checkpoint", "evaluation"),
)
# What runs again inside of these, such as layers that were not kept, belongs to them.
_WHOLE = ("backward", "evaluation")
_open: list[str] = []


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Name what runs inside, of one of `PHASES`; one that is opened in another takes its place.

    Not for threads: a process is in one phase at a time. An exception that leaves the phase says
    so in its attribute `phase`.
    """
    if _open and _open[-1] in _WHOLE:
        yield
        return
    _open.append(name)
    nvtx = torch.cuda.nvtx.range(name) if torch.cuda.is_initialized() else nullcontext()
    try:
        with nvtx, record_function(PREFIX + name):
            yield
    except Exception as error:
        if not hasattr(error, "phase"):
            error.phase = name  # type: ignore[attr-defined]
        raise
    finally:
        _open.pop()
