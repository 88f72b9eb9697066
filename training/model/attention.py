"""Attention over packed samples without flash-attn: one function, registered with transformers.

With `segments` given (see `training.model.segments`) every sample of the pack attends to itself
only, causally or as a whole: on CUDA by PyTorch's own FlashAttention (`torch.nn.attention.varlen`),
elsewhere by one batched call per length bucket. Without segments (tiles, inference) it is plain
scaled-dot-product attention. A layer's sliding window and the soft cap of its scores count on each
of these paths.
"""

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from data_pipeline.errors import InputError
from training.model.bucketed_attention import bucketed_attention, capped_attention, causal_mask
from training.model.segments import PackedSegments

logger = logging.getLogger(__name__)

ATTENTION_NAME = "tokenflex_varlen"
_HALF = (torch.bfloat16, torch.float16)
# What some layers hand over that changes their scores: sinks and biases.
_NOT_IN_PACKS = ("s_aux", "position_bias")


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


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | PackedSegments | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    segments: PackedSegments | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every attention layer; signature and shapes are its own.

    query: [B, H, L, D]. key, value: [B, H_kv, L, D]. B is 1 with segments, which replace the
    attention_mask, or come as it from layers that hand on nothing else. sliding_window: how many
    keys a query sees, its own the last. softcap: scores become softcap * tanh(score / softcap).
    Returns [B, L, H, D] and None. Raises InputError for what packs cannot do.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if isinstance(attention_mask, PackedSegments):
        segments, attention_mask = attention_mask, None
    if segments is None and softcap is not None:
        return _capped_plain(query, key, value, attention_mask, scale, softcap, causal), None
    if segments is None:
        return _plain_attention(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs
        )
    segments.received(sliding_window, softcap)
    _check_packed(query, causal or not segments.causal, dropout, kwargs)
    # A window that no sample fills is none, so that the same kernel runs as without.
    window = sliding_window if (sliding_window or 0) < segments.max_seqlen else None
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))  # [L, heads, D]
    on_gpu = _kind(q) == "cuda"
    if on_gpu and _can_use_varlen(q.dtype, q.shape[-1], q.device, window, softcap):
        return _varlen_attention(q, k, v, scale, segments, window)[None], None
    if not on_gpu and q.dtype in _HALF:  # several times faster there, as below
        q, k, v = q.float(), k.float(), v.float()
    output = bucketed_attention(q, k, v, scale, segments.buckets, window, softcap, segments.causal)
    return output[None].to(query.dtype), None


def _check_packed(query: Tensor, causal: bool, dropout: float, kwargs: Mapping[str, Any]) -> None:
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
    for key in _NOT_IN_PACKS:
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


def _capped_plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scale: float,
    softcap: float,
    causal: bool,
) -> Tensor:
    """As `_plain_attention` where scores have a soft cap, which sdpa does not know."""
    length = query.shape[2]
    if attention_mask is None and causal and length > 1:  # as sdpa: a prompt, maybe before its room
        key, value = key[:, :, :length], value[:, :, :length]
        attention_mask = causal_mask(length, None, query.device)
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        attention_mask = attention_mask == 0
    states = (query, key, value)
    if _kind(query) == "cpu" and query.dtype in _HALF:
        states = (query.float(), key.float(), value.float())
    output = capped_attention(*states, attention_mask, scale, softcap)
    return output.transpose(1, 2).contiguous().to(query.dtype)


def _varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    segments: PackedSegments,
    window: int | None = None,
) -> Tensor:
    """q [L, H, D], k and v [L, H_kv, D] -> [L, H, D] by FlashAttention on the packed row."""
    options = varlen_options(varlen_attn)
    assert options is not None  # _can_use_varlen said so
    if not segments.causal:
        options = {name: options[name] for name in options if name == "enable_gqa"}
    elif window is not None:
        options = {**options, "window_size": (window - 1, 0)}
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
def _can_use_varlen(
    dtype: torch.dtype,
    head_width: int,
    device: torch.device,
    window: int | None = None,
    softcap: float | None = None,
) -> bool:
    """Whether FlashAttention runs for such queries on this GPU; warns, once each, where not."""
    on_gpu = device.type == "cuda"  # else estimated
    capability = torch.cuda.get_device_capability(device) if on_gpu else (8, 0)
    obstacle = varlen_obstacle(dtype, head_width, capability, window, softcap)
    if obstacle is not None:
        logger.warning("Packed attention runs by length buckets, which is slower: %s", obstacle)
    return obstacle is None


def varlen_obstacle(
    dtype: torch.dtype,
    head_width: int,
    capability: tuple[int, int],
    window: int | None = None,
    softcap: float | None = None,
) -> str | None:
    """Why FlashAttention cannot run, with the remedy; None when it can."""
    if softcap is not None:
        return (
            f"PyTorch's FlashAttention has no soft cap, and this model caps scores at {softcap:g}; "
            "their memory grows with the square of a sample's length"
        )
    if dtype not in _HALF:
        return f"FlashAttention does not support {dtype}; train in bfloat16"
    if head_width > 256 or head_width % 8:
        return f"FlashAttention needs heads of a multiple of 8 up to 256, not {head_width} wide"
    if capability < (8, 0):
        return f"FlashAttention needs compute capability 8.0, this GPU has {capability}"
    options = varlen_options(varlen_attn)
    if options is None:
        return f"varlen_attn of torch {torch.__version__} has an unknown signature; use torch 2.13"
    if window is not None and "window_size" not in options:
        return f"varlen_attn of torch {torch.__version__} has no sliding window; use torch 2.13"
    return None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, packed_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, sdpa_mask)
