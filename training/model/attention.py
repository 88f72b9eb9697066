"""Attention over packed samples without flash-attn: one function, registered with transformers.

With `segments` given (see `training.model.segments`) every sample of the pack attends, causally, to
itself only: on CUDA by PyTorch's own FlashAttention (`torch.nn.attention.varlen`), elsewhere by one
batched call per length bucket. Without segments (vision tower, inference) it is plain
scaled-dot-product attention.
"""

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from data_pipeline.errors import InputError
from training.model.segments import LengthBuckets, PackedSegments

logger = logging.getLogger(__name__)

ATTENTION_NAME = "tokenflex_varlen"
_HALF = (torch.bfloat16, torch.float16)


_estimated: ContextVar[bool] = ContextVar("estimated", default=False)


@contextmanager
def as_on_gpu(on_gpu: bool = True) -> Iterator[None]:
    """Take the ways of a GPU for tensors of any device inside, which must be fake."""
    before = _estimated.set(on_gpu)
    try:
        yield
    finally:
        _estimated.reset(before)


def _kind(tensor: Tensor) -> str:
    return "cuda" if _estimated.get() else tensor.device.type


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


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    segments: PackedSegments | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every attention layer; signature and shapes are its own.

    query: [B, H, L, D]. key, value: [B, H_kv, L, D]. B is 1 with segments, which replace the
    attention_mask. Returns [B, L, H, D] and None. Raises InputError for what packs cannot do.
    """
    if segments is None:
        return _plain_attention(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs
        )
    segments.used = True
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    _check_packed(query, causal, dropout, sliding_window, segments, kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))  # [L, heads, D]
    if _kind(q) == "cuda" and _can_use_varlen(q.dtype, q.shape[-1], q.device):
        output = _varlen_attention(q, k, v, scale, segments)
    else:
        output = _bucketed_attention(q, k, v, scale, segments.buckets)
    return output[None], None


def _check_packed(
    query: Tensor,
    causal: bool,
    dropout: float,
    sliding_window: int | None,
    segments: PackedSegments,
    kwargs: Mapping[str, Any],
) -> None:
    """Raise InputError for layers that would be silently wrong on a pack."""
    if query.shape[0] != 1:
        raise InputError(
            f"packed samples came as {query.shape[0]} rows; put the whole pack in one row"
        )
    if not causal:
        raise InputError(
            "packed samples need a causal language model, but its attention is bidirectional"
        )
    if dropout:
        raise InputError(
            f"attention dropout is {dropout}, which packs do not support; set "
            "text_config.attention_dropout to 0"
        )
    if sliding_window is not None and sliding_window < segments.max_seqlen:
        raise InputError(
            f"the language model's sliding_window is {sliding_window} tokens, but a sample has "
            f"{segments.max_seqlen}; lower the pack's max_tokens, raise text_config.sliding_window "
            "or use full attention"
        )
    for key in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(key) is not None:
            raise InputError(
                f"the language model's attention uses {key}, which packs do not support; "
                "use another language model"
            )


def _plain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
    kwargs: Mapping[str, Any],
) -> tuple[Tensor, None]:
    """transformers' sdpa; on CPU in float32, which is several times faster there than bfloat16."""
    dtype = query.dtype
    if _kind(query) == "cpu" and dtype in _HALF:
        query, key, value = query.float(), key.float(), value.float()
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.float()
    output, _ = sdpa_attention_forward(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout,
        scaling=scaling,
        is_causal=is_causal,
        **kwargs,
    )
    return output.to(dtype), None


def _bucketed_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, buckets: LengthBuckets
) -> Tensor:
    """q [L, H, D], k and v [L, H_kv, D] -> [L, H, D]: one batched causal call per bucket."""
    dtype = q.dtype
    if _kind(q) == "cpu" and dtype in _HALF:  # several times faster there, as above
        q, k, v = q.float(), k.float(), v.float()
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
        output = F.scaled_dot_product_attention(
            q_block, k_block, v_block, is_causal=True, scale=scale, enable_gqa=grouped
        )
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return _Collect.apply(torch.cat(outputs), buckets.slot_of_token).to(dtype)


def _varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, segments: PackedSegments
) -> Tensor:
    """q [L, H, D], k and v [L, H_kv, D] -> [L, H, D] by FlashAttention on the packed row."""
    options = varlen_options(varlen_attn)
    assert options is not None  # _can_use_varlen said so
    if "enable_gqa" not in options and (repeats := q.shape[1] // k.shape[1]) > 1:
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    cu_seqlens, longest = segments.cu_seqlens, segments.max_seqlen
    output = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, scale=scale, **options)
    return cast(Tensor, output)


@lru_cache(maxsize=8)
def varlen_options(function: Callable[..., Any]) -> dict[str, Any] | None:
    """Keywords that make `function` causal and let query heads share key heads, if it can.

    `torch.nn.attention.varlen.varlen_attn` changed between releases: causal is `is_causal=True` or
    `window_size=(-1, 0)`, and `enable_gqa` came late. None: the signature is none of those known.
    """
    names = inspect.signature(function).parameters
    if "scale" not in names:
        return None
    options: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in names else {}
    if "window_size" in names:
        return {"window_size": (-1, 0), **options}
    return {"is_causal": True, **options} if "is_causal" in names else None


@lru_cache(maxsize=32)
def _can_use_varlen(dtype: torch.dtype, head_width: int, device: torch.device) -> bool:
    """Whether FlashAttention runs for such queries on this GPU; warns, once each, where not."""
    on_gpu = device.type == "cuda"  # else estimated
    capability = torch.cuda.get_device_capability(device) if on_gpu else (8, 0)
    obstacle = varlen_obstacle(dtype, head_width, capability)
    if obstacle is not None:
        logger.warning("Packed attention runs by length buckets, which is slower: %s", obstacle)
    return obstacle is None


def varlen_obstacle(dtype: torch.dtype, head_width: int, capability: tuple[int, int]) -> str | None:
    """Why FlashAttention cannot run, with the remedy; None when it can."""
    if dtype not in _HALF:
        return f"FlashAttention does not support {dtype}; train in bfloat16"
    if head_width > 256 or head_width % 8:
        return f"FlashAttention needs heads of a multiple of 8 up to 256, not {head_width} wide"
    if capability < (8, 0):
        return f"FlashAttention needs compute capability 8.0, this GPU has {capability}"
    if varlen_options(varlen_attn) is None:
        return f"varlen_attn of torch {torch.__version__} has an unknown signature; use torch 2.13"
    return None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, packed_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, sdpa_mask)
