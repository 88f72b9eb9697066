"""What runs the projector: the same on every rank, and whether Triton can, before training."""

import os
import socket

import torch

from data_pipeline.errors import InputError
from kernels import implementation, triton_obstacle
from training.distributed import Ranks, gather


def choose_projector(setting: str, ranks: Ranks, dtype: torch.dtype) -> tuple[str, str]:
    """What `train.projector_impl` comes to, and what keeps `auto` from Triton, if anything does.

    Collective: where one rank cannot launch a kernel, none does, since the same steps in PyTorch
    give other bits and take another time.

    Raises:
        InputError: Triton was asked for by name, and a rank cannot.
    """
    obstacle = ""
    if ranks.device.type == "cuda" and setting != "torch":
        impl, obstacle = "triton", triton_obstacle(ranks.device) or ""
    else:
        try:
            impl = implementation(setting, ranks.device, dtype)
        except ValueError as error:
            raise InputError(f"train.projector_impl: {error}") from error
    found = obstacles_of_ranks(obstacle, ranks)
    if found and setting == "triton":
        raise InputError(
            f"train.projector_impl is 'triton', but {found}; mend that, or set it to auto"
        )
    return ("torch" if found else impl), found


def obstacles_of_ranks(obstacle: str, ranks: Ranks) -> str:
    """What keeps ranks from something, in words; "" where nothing does on any (collective)."""
    where = f"node {os.environ.get('SLURMD_NODENAME') or socket.gethostname()}, rank {ranks.rank}"
    return _in_words([(where, text) for where, text in gather((where, obstacle)) if text])


def _in_words(obstacles: list[tuple[str, str]]) -> str:
    """Each obstacle once, with the first of the ranks that have it."""
    ranks: dict[str, list[str]] = {}
    for where, text in obstacles:
        ranks.setdefault(text, []).append(where)
    others = {text: f" and {len(at) - 1} more" * (len(at) > 1) for text, at in ranks.items()}
    return "; ".join(f"{at[0]}{others[text]}: {text}" for text, at in ranks.items())
