"""Peak memory of the loss by the number of its slices, at a large vocabulary, by tensor accounting.

Fake tensors: nothing is computed, and the storages are those of a real pass. Beside it the loss of
a model without slices, whose logits are of all positions, as transformers computes it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.loss.loss_utils import ForCausalLMLoss

from training.estimate.ledger import Ledger
from training.model.loss import Supervision, chunked_cross_entropy

TOKENS, WIDTH, VOCABULARY = 8192, 2048, 150_000
SLICES = (1, 2, 4, 8, 16)


def loss_memory(supervised: float) -> dict[str, Any]:
    """GiB above hidden states and head, forward and backward of a pack in bf16.

    supervised: the share of the pack's tokens that have a label.
    """
    rows = round(supervised * TOKENS)
    sliced = {slices: _sliced(rows, slices) for slices in SLICES}
    return {
        "tokens": TOKENS,
        "supervised": rows,
        "width": WIDTH,
        "vocabulary": VOCABULARY,
        "gib_by_slices": {str(slices): peak / 2**30 for slices, peak in sliced.items()},
        "of_one_slice": {str(slices): peak / sliced[1] for slices, peak in sliced.items()},
        "gib_of_all_positions": _peak(_all_positions) / 2**30,
    }


def _sliced(rows: int, slices: int) -> int:
    def loss(hidden: Tensor, head: nn.Module) -> Tensor:
        given = Supervision(
            torch.arange(rows), torch.zeros(rows, dtype=torch.int64), torch.ones(rows)
        )
        return chunked_cross_entropy(hidden, given, head, slices)[0]

    return _peak(loss)


def _all_positions(hidden: Tensor, head: nn.Module) -> Tensor:
    labels = torch.zeros(hidden.shape[:2], dtype=torch.int64)
    loss: Tensor = ForCausalLMLoss(head(hidden), labels, VOCABULARY)
    return loss


def _peak(loss: Callable[[Tensor, nn.Module], Tensor]) -> int:
    """Most bytes at one time beyond those of hidden states, head and their gradients."""
    ledger = Ledger()
    with FakeTensorMode(), ledger:
        hidden = torch.randn(1, TOKENS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
        head = nn.Linear(WIDTH, VOCABULARY, bias=False, dtype=torch.bfloat16)
        # Gradients are there beforehand, as those of a step are.
        for given in (hidden, head.weight):
            given.grad = torch.zeros_like(given)
        before = ledger.total
        ledger.forget()
        loss(hidden, head).backward()
    return ledger.peak - before
