"""Consistency of token counts: copies of a sample learn to answer like the largest of them.

The term is the divergence KL(teacher || student) between next-token distributions at the supervised
positions, as ViCO has it (InternVL3.5): the teacher is the sample's copy of the most tokens, whose
distribution is taken as given; the others are students.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from training.model.loss import Supervision


def chunked_consistency(
    hidden: Tensor, supervision: Supervision, lm_head: Callable[[Tensor], Tensor], chunks: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `chunked_cross_entropy`, with the students' weighted divergences added to the loss.

    lm_head runs twice in each chunk, for the teachers without a gradient: on every rank as often.
    Also returns the divergences, float32 [K], detached, 0 where a copy is its own teacher.
    """
    if chunks < 1:
        raise ValueError(f"loss_chunks is {chunks}; must be at least 1")
    given = supervision.consistency
    assert given is not None
    selected = hidden.flatten(0, 1).index_select(0, supervision.positions)  # [K, D]
    teachers = selected.detach().index_select(0, given.teachers)  # [K, D]
    parts = zip(
        selected.tensor_split(chunks),
        teachers.tensor_split(chunks),
        supervision.targets.tensor_split(chunks),
        strict=True,
    )
    found = [
        _chunk(*part, lm_head)
        if chunks == 1
        else checkpoint(_chunk, *part, lm_head, use_reentrant=False)
        for part in parts
    ]
    losses, divergences, predictions = (torch.cat(column) for column in zip(*found, strict=True))
    loss = (supervision.weights * losses).sum() + (given.weights * divergences).sum()
    return loss, losses.detach(), predictions, divergences.detach()


def _chunk(
    students: Tensor, teachers: Tensor, targets: Tensor, lm_head: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.no_grad():
        reference = lm_head(teachers).float().log_softmax(-1)  # [k, V]
    logits = lm_head(students).float()  # [k, V]
    own = logits.log_softmax(-1)
    divergence = F.kl_div(own, reference, log_target=True, reduction="none").sum(-1)
    loss = F.nll_loss(own, targets, reduction="none")
    return loss, divergence, logits.detach().argmax(-1)
