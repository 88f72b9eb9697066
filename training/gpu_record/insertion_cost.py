"""What it costs to put the image features among the token embeddings, in two ways.

By a mask (`masked_scatter`: a prefix sum over [L, D] forward, `masked_select` backward), and at
positions that the host knows (`index_copy`).
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from training.model.packed import insert_features

WARMUP, SAMPLES = 5, 20


def by_mask(embeds: Tensor, mask: Tensor, positions: Tensor, features: Tensor) -> Tensor:
    """embeds [L, D] with features [K, D] where mask [L] is true."""
    return embeds.masked_scatter(mask[:, None], features)


def by_position(embeds: Tensor, mask: Tensor, positions: Tensor, features: Tensor) -> Tensor:
    """embeds [L, D] with features [K, D] at positions int64 [K], as training does it."""
    return insert_features(embeds[None], positions, features)[0]


def insertion_ms(
    mask: Tensor, width: int, dtype: torch.dtype, device: torch.device
) -> dict[str, float]:
    """Median milliseconds of forward and backward in each way, for mask bool [L] and D = width."""
    mask = mask.to(device)
    positions = mask.nonzero().flatten()
    embeds = torch.randn(len(mask), width, dtype=dtype, device=device, requires_grad=True)
    features = torch.randn(len(positions), width, dtype=dtype, device=device, requires_grad=True)
    upstream = torch.randn_like(embeds)
    found = {}
    for name, insert in (("masked_scatter_ms", by_mask), ("index_copy_ms", by_position)):

        def call(insert: Callable[..., Tensor] = insert) -> None:
            out = insert(embeds, mask, positions, features)
            torch.autograd.grad(out, (embeds, features), upstream)

        found[name] = _median_ms(call, device)
    return found


def _median_ms(call: Callable[[], None], device: torch.device) -> float:
    """Of calls with the device idle before each: the wait that a call makes counts."""
    times = []
    for _ in range(WARMUP + SAMPLES):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[WARMUP:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
