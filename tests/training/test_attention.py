"""Packed attention: every sample attends to itself only, on each of the paths it can take."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.errors import InputError
from training.model import attention
from training.model.attention import packed_attention, varlen_obstacle, varlen_options
from training.model.segments import LengthBuckets, PackedSegments, bucket_capacity, find_segments

CPU = torch.device("cpu")
LENGTHS = [5, 40, 1, 17, 5, 64, 33, 16]
LAYER = SimpleNamespace(is_causal=True, num_key_value_groups=2)


def cumulative(lengths: list[int]) -> Tensor:
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()


def segments_of(
    lengths: list[int], device: torch.device = CPU, causal: bool = True
) -> PackedSegments:
    return PackedSegments(cumulative(lengths).to(device), max(lengths), device, causal)


def make_states(
    lengths: list[int], dtype: torch.dtype = torch.float32, heads: int = 4, key_heads: int = 2
) -> list[Tensor]:
    """Query, key and value as a decoder hands them over: [1, heads, L, D]."""
    generator = torch.Generator().manual_seed(0)
    total = sum(lengths)
    return [
        torch.randn(1, total, count, 8, generator=generator, dtype=torch.float64)
        .to(dtype)
        .transpose(1, 2)
        for count in (heads, key_heads, key_heads)
    ]


def one_by_one(
    states: list[Tensor],
    lengths: list[int],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    causal: bool = True,
) -> Tensor:
    """Softmax attention written out, sample by sample: [1, L, H, D]."""
    query, key, value = (s[0] for s in states)
    repeats = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(repeats, 0), value.repeat_interleave(repeats, 0)
    outputs, start = [], 0
    for length in lengths:
        part = slice(start, start + length)
        scores = query[:, part] @ key[:, part].transpose(1, 2) * scale
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        behind = torch.arange(length, device=scores.device)
        behind = behind[:, None] - behind  # of the query, a key is
        hidden = ((behind < 0) | (behind >= (window or length))) & causal
        outputs.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value[:, part])
        start += length
    return torch.cat(outputs, 1).transpose(0, 1)[None]


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_packed_equals_one_by_one_with_gradients(key_heads):
    states = [s.requires_grad_() for s in make_states(LENGTHS, torch.float64, 4, key_heads)]
    found, weights = packed_attention(
        LAYER, *states, None, scaling=0.3, segments=segments_of(LENGTHS)
    )
    expected = one_by_one(states, LENGTHS, 0.3)
    assert weights is None
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    out_grad = torch.randn(found.shape, dtype=torch.float64)
    grads = torch.autograd.grad(found, states, out_grad)
    for grad, wanted in zip(grads, torch.autograd.grad(expected, states, out_grad), strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("key_heads", [2, 4])
def test_whole_samples_equal_one_by_one_with_gradients(key_heads):
    """As a tower's layers ask, which hand on nothing but a mask."""
    states = [s.requires_grad_() for s in make_states(LENGTHS, torch.float64, 4, key_heads)]
    segments = segments_of(LENGTHS, causal=False)
    found, _ = packed_attention(LAYER, *states, segments, scaling=0.3, is_causal=False)
    expected = one_by_one(states, LENGTHS, 0.3, causal=False)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    out_grad = torch.randn(found.shape, dtype=torch.float64)
    grads = torch.autograd.grad(found, states, out_grad)
    for grad, wanted in zip(grads, torch.autograd.grad(expected, states, out_grad), strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("window", [1, 6, 17, None])
@pytest.mark.parametrize("softcap", [0.7, None])
def test_windows_and_soft_caps_equal_one_by_one_with_gradients(window, softcap):
    states = [s.requires_grad_() for s in make_states(LENGTHS, torch.float64)]
    segments = segments_of(LENGTHS)
    found, _ = packed_attention(
        LAYER, *states, None, segments=segments, sliding_window=window, softcap=softcap
    )
    expected = one_by_one(states, LENGTHS, 8**-0.5, window, softcap)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    out_grad = torch.randn(found.shape, dtype=torch.float64)
    grads = torch.autograd.grad(found, states, out_grad)
    for grad, wanted in zip(grads, torch.autograd.grad(expected, states, out_grad), strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-9, atol=1e-9)
    assert segments.windows == {window} - {None} and segments.softcaps == {softcap} - {None}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rows", [1, 12])
def test_soft_caps_without_segments(masked, rows):
    """A prompt, or one more token behind a cache: transformers gives no mask where it is plain."""
    states = make_states([12], torch.float64)
    expected = one_by_one(states, [12], 8**-0.5, None, 0.7)[:, -rows:]
    query = states[0][:, :, -rows:]
    mask = torch.ones(12, 12, dtype=torch.bool).tril()[-rows:][None, None] if masked else None
    found, _ = packed_attention(LAYER, query, *states[1:], mask, softcap=0.7)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_the_scale_defaults_to_the_head_width():
    states = make_states(LENGTHS)
    found, _ = packed_attention(LAYER, *states, None, segments=segments_of(LENGTHS))
    torch.testing.assert_close(found, one_by_one(states, LENGTHS, 8**-0.5))


def test_half_precision_on_cpu_is_computed_in_float32_and_rounded_once():
    states = make_states(LENGTHS, torch.bfloat16)
    wide, _ = packed_attention(
        LAYER, *(s.float() for s in states), None, segments=segments_of(LENGTHS)
    )
    found, _ = packed_attention(LAYER, *states, None, segments=segments_of(LENGTHS))
    assert found.dtype == torch.bfloat16 and torch.equal(found, wide.bfloat16())


@pytest.mark.parametrize("poison", [1e4, float("nan"), float("inf")])
def test_another_samples_values_never_reach_a_sample_bitwise(poison):
    states = make_states(LENGTHS)
    before, _ = packed_attention(LAYER, *states, None, segments=segments_of(LENGTHS))
    starts = cumulative(LENGTHS).tolist()
    for sample in (0, 3, 5):
        inside = slice(starts[sample], starts[sample + 1])
        poisoned = [s.clone() for s in states]
        for s in poisoned:
            s[:, :, inside] = poison
        after, _ = packed_attention(LAYER, *poisoned, None, segments=segments_of(LENGTHS))
        others = torch.ones(sum(LENGTHS), dtype=torch.bool)
        others[inside] = False
        assert torch.equal(after[:, others], before[:, others])
        assert not torch.equal(after[:, inside], before[:, inside])


def test_buckets_hold_every_token_once_and_never_mix_samples():
    generator = np.random.default_rng(0)
    for samples in (1, 7, 60):
        lengths = generator.integers(0, 300, samples)
        lengths[0] = 70
        bounds = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
        buckets = LengthBuckets(bounds, CPU)
        assert torch.equal(
            buckets.token_of_slot[buckets.slot_of_token], torch.arange(int(bounds[-1]))
        )
        owner = np.repeat(np.arange(samples), lengths)
        parts = buckets.token_of_slot.split([rows * width for rows, width in buckets.blocks])
        for (rows, width), tokens in zip(buckets.blocks, parts, strict=True):
            row_owner = owner[tokens.reshape(rows, width).numpy()]
            assert (row_owner == row_owner[:, :1]).all()
        assert sum(rows for rows, _ in buckets.blocks) == (lengths > 0).sum()


def test_bucket_capacity_pads_little_and_gives_few_buckets():
    lengths = np.arange(1, 5000)
    capacity = bucket_capacity(lengths)
    assert (capacity >= lengths).all()
    assert (capacity[lengths >= 64] <= 1.25 * lengths[lengths >= 64]).all()
    assert capacity[:16].tolist() == [16] * 16
    assert len(np.unique(capacity)) < 40


def test_bucket_indices_are_built_once_for_all_layers(monkeypatch):
    built = []
    original = LengthBuckets.__init__
    monkeypatch.setattr(
        LengthBuckets,
        "__init__",
        lambda self, *given: (built.append(1), original(self, *given))[1],
    )
    segments, states = segments_of(LENGTHS), make_states(LENGTHS)
    for _ in range(3):
        packed_attention(LAYER, *states, None, segments=segments)
    assert len(built) == 1 and segments.used


@pytest.mark.parametrize(
    ("states", "arguments", "message"),
    [
        (make_states([16]), {"position_bias": torch.ones(4)}, "uses position_bias"),
        (make_states([16]), {"s_aux": torch.ones(4)}, "uses s_aux"),
        (make_states([16]), {"dropout": 0.1}, "dropout is 0.1"),
        (make_states([16]), {"is_causal": False}, "is bidirectional"),
        ([s.expand(2, -1, -1, -1) for s in make_states([16])], {}, "as 2 rows"),
    ],
)
def test_what_packs_cannot_do_is_an_error(states, arguments, message):
    with pytest.raises(InputError, match=message):
        packed_attention(LAYER, *states, None, segments=segments_of([16]), **arguments)


def test_a_window_as_long_as_the_longest_sample_changes_nothing():
    states = make_states(LENGTHS)
    wide, _ = packed_attention(
        LAYER, *states, None, segments=segments_of(LENGTHS), sliding_window=max(LENGTHS)
    )
    torch.testing.assert_close(wide, one_by_one(states, LENGTHS, 8**-0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_segments_it_is_plain_attention(dtype):
    states = make_states([12], dtype)
    full = [s.repeat_interleave(4 // s.shape[1], 1) for s in states]
    vision = SimpleNamespace(is_causal=False)
    found, _ = packed_attention(vision, *full, None)
    expected = F.scaled_dot_product_attention(*(s.float() for s in full)).transpose(1, 2)
    torch.testing.assert_close(found, expected.to(dtype))
    assert found.dtype == dtype
    causal, _ = packed_attention(LAYER, *states, None)
    torch.testing.assert_close(
        causal.float(), one_by_one([s.float() for s in states], [12], 8**-0.5), rtol=1e-2, atol=1e-2
    )
    mask = torch.rand(1, 1, 12, 12, generator=torch.Generator().manual_seed(0)) > 0.5
    mask |= torch.eye(12, dtype=torch.bool)
    masked, _ = packed_attention(LAYER, *states, mask)
    expected = F.scaled_dot_product_attention(*(s.float() for s in full), attn_mask=mask)
    torch.testing.assert_close(masked, expected.transpose(1, 2).to(dtype))


def test_segments_come_from_positions_that_restart():
    ids = torch.zeros(1, 9, dtype=torch.int64)
    positions = torch.tensor([[0, 1, 2, 0, 0, 1, 5, 6, 7]])
    found = find_segments(ids, positions, None, None)
    assert found.cu_seqlens.tolist() == [0, 3, 4, 6, 9] and found.max_seqlen == 3
    assert found.cu_seqlens.dtype == torch.int32
    assert find_segments(ids, torch.arange(9)[None], None, None) is None
    assert find_segments(ids, None, None, None) is None


@pytest.mark.parametrize("bounds", [[0, 4, 8], [1, 9], [0, 10]])
def test_segments_that_do_not_cover_the_row_are_an_error(bounds):
    ids = torch.zeros(1, 9, dtype=torch.int64)
    with pytest.raises(InputError, match=r"\b0 to .*\b9 input_ids"):
        find_segments(ids, torch.arange(9)[None], torch.tensor(bounds), None)
    with pytest.raises(InputError, match="without position_ids"):
        find_segments(ids, None, torch.tensor([0, 9]), None)


def reference_varlen(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, scale, causal, left=-1) -> Tensor:
    """What varlen_attn computes, on [L, heads, D]; left: keys seen before a query's own, -1 all."""
    lengths = cu_seq_q.diff().tolist()
    assert torch.equal(cu_seq_q, cu_seq_k) and max_q == max_k == max(lengths)
    assert cu_seq_q.dtype == torch.int32
    window = left + 1 if left >= 0 else None
    states = [s.transpose(0, 1)[None] for s in (q, k, v)]
    return one_by_one(states, lengths, scale, window, causal=causal)[0]


def windowed_grouped(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None,
    window_size=(-1, -1), enable_gqa=False,
):  # fmt: skip
    assert enable_gqa
    left, right = window_size
    return reference_varlen(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, right == 0, left
    )


def windowed(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)
):
    assert query.shape == key.shape
    left, right = window_size
    return reference_varlen(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, right == 0, left
    )


def flagged(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, scale=None):
    assert query.shape == key.shape
    return reference_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, is_causal)


def unknown(query, key, value, cu_seqlens, mask, scale=None):
    raise AssertionError("must not be called")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("function", [windowed_grouped, windowed, flagged])
def test_every_known_varlen_signature_is_called_right(monkeypatch, function, causal):
    """FlashAttention needs CUDA; here stand-ins with the signatures of several torch releases."""
    monkeypatch.setattr(attention, "varlen_attn", function)
    states = make_states(LENGTHS)
    q, k, v = (s[0].transpose(0, 1) for s in states)
    found = attention._varlen_attention(q, k, v, 0.3, segments_of(LENGTHS, causal=causal))
    torch.testing.assert_close(found[None], one_by_one(states, LENGTHS, 0.3, causal=causal))


@pytest.mark.parametrize("function", [windowed_grouped, windowed])
def test_a_sliding_window_reaches_varlen_attn(monkeypatch, function):
    monkeypatch.setattr(attention, "varlen_attn", function)
    states = make_states(LENGTHS)
    q, k, v = (s[0].transpose(0, 1) for s in states)
    found = attention._varlen_attention(q, k, v, 0.3, segments_of(LENGTHS), 6)
    torch.testing.assert_close(found[None], one_by_one(states, LENGTHS, 0.3, 6))


def test_what_flash_attention_lacks_runs_by_buckets(monkeypatch):
    known = (torch.bfloat16, 64, (9, 0))
    assert varlen_obstacle(*known, window=6) is None
    assert "caps scores at 50" in varlen_obstacle(*known, softcap=50.0)
    monkeypatch.setattr(attention, "varlen_attn", flagged)
    assert varlen_obstacle(*known) is None
    assert "no sliding window" in varlen_obstacle(*known, window=6)


def test_the_installed_varlen_attn_is_known():
    assert varlen_options(attention.varlen_attn) is not None
    assert varlen_options(unknown) is None


@pytest.mark.parametrize(
    ("dtype", "width", "capability", "message"),
    [
        (torch.float32, 64, (9, 0), "train in bfloat16"),
        (torch.bfloat16, 260, (9, 0), "not 260 wide"),
        (torch.bfloat16, 12, (9, 0), "not 12 wide"),
        (torch.bfloat16, 64, (7, 5), "compute capability 8.0"),
    ],
)
def test_obstacles_to_flash_attention_are_named(dtype, width, capability, message):
    assert message in varlen_obstacle(dtype, width, capability)
    assert varlen_obstacle(torch.bfloat16, 64, (9, 0)) is None


def test_the_slow_path_on_a_gpu_is_announced_once(monkeypatch, caplog):
    monkeypatch.setattr(attention, "varlen_attn", unknown)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    device = torch.device("cuda", 0)
    attention._can_use_varlen.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert not any(attention._can_use_varlen(torch.bfloat16, 64, device) for _ in range(3))
    attention._can_use_varlen.cache_clear()
    assert [record.message for record in caplog.records] == [
        "Packed attention runs by length buckets, which is slower: varlen_attn of torch "
        f"{torch.__version__} has an unknown signature; use torch 2.13"
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_flash_attention_equals_the_buckets_and_isolates_samples():
    device = torch.device("cuda")
    states = [s.to(device).requires_grad_() for s in make_states(LENGTHS, torch.bfloat16)]
    assert attention._can_use_varlen(torch.bfloat16, 8, device)
    found, _ = packed_attention(LAYER, *states, None, segments=segments_of(LENGTHS, device))
    wide = [s.detach().float().requires_grad_() for s in states]
    expected = one_by_one(wide, LENGTHS, 8**-0.5)
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)
    grads = torch.autograd.grad(found.float().square().sum(), states)
    wanted = torch.autograd.grad(expected.square().sum(), wide)
    for grad, want in zip(grads, wanted, strict=True):
        assert ((grad.float() - want).norm() / want.norm()).item() < 2e-2
    changed = [s.detach().clone() for s in states]
    for s in changed:
        s[:, :, : LENGTHS[0]] += 1
    after, _ = packed_attention(LAYER, *changed, None, segments=segments_of(LENGTHS, device))
    assert torch.equal(after[:, LENGTHS[0] :], found.detach()[:, LENGTHS[0] :])
