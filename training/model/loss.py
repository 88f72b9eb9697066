"""Weighted next-token cross-entropy: logits at supervised positions only, chunk by chunk."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORED_LABEL = -100


@dataclass(frozen=True)
class Consistency:
    """Whose answer each supervised token is to give, on the model's device.

    teachers: int64 [K], the place among the K of the same token in the sample's copy of the most
    vision tokens. weights: float32 [K], of the divergence from it; 0 in that copy itself.
    """

    teachers: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Supervision:
    """Where the loss is taken: all of length K, in sequence order, on the model's device.

    positions: int64, index into the flattened [B * L] hidden states. targets: int64 ids of the
    following tokens.
    weights: float32.
    consistency: for the loss of `chunked_consistency`.
    """

    positions: Tensor
    targets: Tensor
    weights: Tensor
    consistency: Consistency | None = None


def find_supervision(
    labels: Tensor, loss_weights: Tensor | None, device: torch.device
) -> Supervision:
    """Shift: position i predicts label i + 1, so the first label of a row is never used.

    labels: [B, L], -100 ignored. loss_weights: [B, L] aligned with labels, or None for 1. Counting
    the supervised positions waits for the device when labels are on it; labels left on the host
    cost no wait.
    """
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL).flatten()
    positions = (following != IGNORED_LABEL).nonzero().flatten()
    targets = following[positions].to(device, non_blocking=True)
    if loss_weights is None:
        weights = torch.ones(len(positions), dtype=torch.float32, device=device)
    else:
        shifted = F.pad(loss_weights[:, 1:], (0, 1)).flatten()
        weights = shifted[positions.to(shifted.device)].float().to(device, non_blocking=True)
    return Supervision(positions.to(device, non_blocking=True), targets, weights)


def chunked_cross_entropy(
    hidden: Tensor, supervision: Supervision, lm_head: Callable[[Tensor], Tensor], chunks: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, per-token losses and predictions at the supervised positions.

    hidden: [B, L, D]. lm_head: called as a module, so that ZeRO-3 gathers its weight. chunks:
    lm_head runs exactly this often on every rank, also on empty chunks, so ranks never wait for
    each other's collectives; with more than one, each chunk's logits are computed again in backward
    instead of kept. Returns loss (float32 scalar, the weighted sum, not normalised), token losses
    [K] float32 detached, predictions [K].
    """
    if chunks < 1:
        raise ValueError(f"loss_chunks is {chunks}; must be at least 1")
    selected = hidden.flatten(0, 1).index_select(0, supervision.positions)  # [K, D]
    losses, predictions = [], []
    for rows, targets in zip(
        selected.tensor_split(chunks), supervision.targets.tensor_split(chunks), strict=True
    ):
        if chunks == 1:
            loss, prediction = _chunk(rows, targets, lm_head)
        else:
            loss, prediction = checkpoint(_chunk, rows, targets, lm_head, use_reentrant=False)
        losses.append(loss)
        predictions.append(prediction)
    token_losses = torch.cat(losses)
    return (supervision.weights * token_losses).sum(), token_losses.detach(), torch.cat(predictions)


def _chunk(
    hidden: Tensor, targets: Tensor, lm_head: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    logits = lm_head(hidden).float()  # [k, V]
    loss = F.cross_entropy(logits, targets, reduction="none")
    return loss, logits.detach().argmax(-1)
