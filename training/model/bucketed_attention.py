"""Packed attention by length buckets: samples of like length are a dense block, and one call.

What FlashAttention cannot do runs here on every device: float32, and scores with a soft cap, which
are written out.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from training.model.segments import LengthBuckets


class _Fill(torch.autograd.Function):
    """Tokens -> slots. Backward reads each token's own slot only: see `_Collect`."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, token_of_slot: Tensor, slot_of_token: Tensor) -> Tensor:
        ctx.save_for_backward(slot_of_token)
        return tokens.index_select(0, token_of_slot)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (slot_of_token,) = ctx.saved_tensors
        return grads[0].index_select(0, slot_of_token), None, None


class _Collect(torch.autograd.Function):
    """Slots -> tokens. Backward gives slots that no token reads a gradient of exactly zero.

    Their queries then contribute nothing to keys and values, and no real query sees their keys, so
    `_Fill` may drop them: gathers both ways instead of a slow accumulating scatter.
    """

    @staticmethod
    def forward(ctx: Any, slots: Tensor, slot_of_token: Tensor) -> Tensor:
        ctx.save_for_backward(slot_of_token)
        ctx.slots = slots.shape[0]
        return slots.index_select(0, slot_of_token)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (slot_of_token,) = ctx.saved_tensors
        out = grads[0].new_zeros(ctx.slots, *grads[0].shape[1:])
        return out.index_copy_(0, slot_of_token, grads[0]), None


def bucketed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    buckets: LengthBuckets,
    window: int | None = None,
    softcap: float | None = None,
    causal: bool = True,
) -> Tensor:
    """q [L, H, D], k and v [L, H_kv, D] -> [L, H, D]: one batched call per bucket.

    window: the keys that a query sees, its own the last of them; None: all before it.
    softcap: see `capped_attention`. causal: false for buckets without padding, whose tokens see all
        of their sample; they have neither a window nor a soft cap.
    """
    grouped = q.shape[1] != k.shape[1]
    sizes = [samples * capacity for samples, capacity in buckets.blocks]
    blocks = zip(
        buckets.blocks,
        *(
            _Fill.apply(states, buckets.token_of_slot, buckets.slot_of_token).split(sizes)
            for states in (q, k, v)
        ),
        strict=True,
    )
    outputs = []
    for shape, *states in blocks:
        q_block, k_block, v_block = (block.unflatten(0, shape).transpose(1, 2) for block in states)
        reach = window if window is not None and window < shape[1] else None
        plain = reach is None and softcap is None
        mask = None if plain else causal_mask(shape[1], reach, q.device)
        if softcap is not None:
            output = capped_attention(q_block, k_block, v_block, mask, scale, softcap)
        else:
            output = F.scaled_dot_product_attention(
                q_block,
                k_block,
                v_block,
                attn_mask=mask,
                is_causal=causal and mask is None,
                scale=scale,
                enable_gqa=grouped,
            )
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return _Collect.apply(torch.cat(outputs), buckets.slot_of_token)


def causal_mask(length: int, window: int | None, device: torch.device) -> Tensor:
    """bool [length, length]: which keys (columns) each query (row) sees."""
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return mask if window is None else mask.triu(1 - window)


def capped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """Attention whose scores are softcap * tanh(score / softcap): [B, H, L, D].

    query: [B, H, L, D]. key, value: [B, H_kv, K, D]. mask: bool, broadcast to [B, H, L, K]; None:
    all keys. The scores are kept for backward.
    """
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * scale / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    exact = scores if scores.dtype == torch.float64 else scores.float()
    return exact.softmax(-1).to(value.dtype) @ value
