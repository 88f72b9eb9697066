"""The fused GEMMs against float64, on the GPU where there is one, else in Triton's interpreter."""

import pytest
import torch
from torch import Tensor

from kernels import launch
from kernels.launch import LaunchConfig, shipped_config
from kernels.triton_impl.dual_gemm import dual_gemm_swiglu
from kernels.triton_impl.gate_gemm import gate_gemm_backward

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LIMITS = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
DTYPES = list(LIMITS)
# M, C (or D), F: tails in each; C = 36 has rows that TMA cannot load.
SHAPES = [(1, 96, 136), (37, 72, 136), (130, 96, 200), (130, 36, 136), (64, 64, 128)]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty and empty_like return NaN: what a kernel does not write shows."""

    def poison(allocate):
        return lambda *args, **kwargs: allocate(*args, **kwargs).fill_(float("nan"))

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))


def normal(*shape: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(DEVICE)


def forward_inputs(rows: int, channels: int, hidden: int, dtype: torch.dtype) -> list[Tensor]:
    """normed, w1, b1, w2, b2."""
    scale = channels**-0.5
    return [
        normal(rows, channels, dtype=dtype, seed=0),
        normal(hidden, channels, dtype=dtype, seed=1, scale=scale),
        normal(hidden, dtype=dtype, seed=2),
        normal(hidden, channels, dtype=dtype, seed=3, scale=scale),
        normal(hidden, dtype=dtype, seed=4),
    ]


def backward_inputs(rows: int, width: int, hidden: int, dtype: torch.dtype) -> list[Tensor]:
    """dout, w3, a, b."""
    return [
        normal(rows, width, dtype=dtype, seed=5),
        normal(width, hidden, dtype=dtype, seed=6, scale=width**-0.5),
        normal(rows, hidden, dtype=dtype, seed=7),
        normal(rows, hidden, dtype=dtype, seed=8),
    ]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


def assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    assert found.shape == expected.shape
    assert relative_error(found, expected) < LIMITS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, channels, hidden", SHAPES)
def test_dual_gemm_equals_float64(rows, channels, hidden, dtype):
    inputs = forward_inputs(rows, channels, hidden, dtype)
    gated, a, b = dual_gemm_swiglu(*inputs, keep_gates=True)
    normed, w1, b1, w2, b2 = (tensor.double() for tensor in inputs)
    gate, linear = normed @ w1.T + b1, normed @ w2.T + b2
    assert_close(a, gate, dtype)
    assert_close(b, linear, dtype)
    assert_close(gated, gate / (1 + (-gate).exp()) * linear, dtype)


def test_dual_gemm_rounds_the_gates_before_their_product():
    gated, a, b = dual_gemm_swiglu(*forward_inputs(64, 96, 136, torch.float16), keep_gates=True)
    from_rounded = torch.nn.functional.silu(a.double()) * b.double()
    # One rounding: half a unit of float16, and a little for float32. (Not bfloat16: the interpreter
    # truncates to it.)
    torch.testing.assert_close(gated.double(), from_rounded, rtol=2**-11 * 1.01, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dual_gemm_is_the_same_without_keeping_the_gates(dtype):
    inputs = forward_inputs(37, 96, 136, dtype)
    kept = dual_gemm_swiglu(*inputs, keep_gates=True)
    gated, a, b = dual_gemm_swiglu(*inputs, keep_gates=False)
    assert a is None and b is None
    assert torch.equal(gated, kept[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, width, hidden", SHAPES)
def test_gate_gemm_equals_float64(rows, width, hidden, dtype):
    inputs = backward_inputs(rows, width, hidden, dtype)
    before = [tensor.clone() for tensor in inputs]
    da, db, gated, sum_a, sum_b = gate_gemm_backward(*inputs)
    for tensor, clone in zip(inputs, before, strict=True):
        assert torch.equal(tensor, clone), "an input was written to"

    dout, w3, a, b = (tensor.double() for tensor in inputs)
    a.requires_grad_(), b.requires_grad_()
    s = a / (1 + (-a).exp()) * b
    expected_a, expected_b = torch.autograd.grad(s, (a, b), dout @ w3)
    assert_close(da, expected_a, dtype)
    assert_close(db, expected_b, dtype)
    assert_close(gated, s.detach(), dtype)
    for found, rounded in ((sum_a, da), (sum_b, db)):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), rounded.double().sum(0), rtol=1e-4, atol=1e-4)


def test_gate_gemm_writes_over_the_gates_where_asked():
    inputs = backward_inputs(130, 64, 136, torch.float16)
    expected = gate_gemm_backward(*inputs)
    dout, w3, a, b = (tensor.clone() for tensor in inputs)
    found = gate_gemm_backward(dout, w3, a, b, out_a=a, out_b=b)
    assert found[0].data_ptr() == a.data_ptr() and found[1].data_ptr() == b.data_ptr()
    for tensor, other in zip(found, expected, strict=True):
        assert torch.equal(tensor, other)


def test_transposed_and_shifted_inputs():
    """Not contiguous, and a base that TMA cannot load from."""
    normed, w1, b1, w2, b2 = forward_inputs(37, 64, 136, torch.float16)
    shifted = torch.zeros(w1.numel() + 1, dtype=w1.dtype, device=DEVICE)[1:].view_as(w1).copy_(w1)
    assert shifted.data_ptr() % 16 != 0
    found = dual_gemm_swiglu(normed.T.contiguous().T, shifted, b1, w2, b2, keep_gates=True)
    expected = dual_gemm_swiglu(normed, w1, b1, w2, b2, keep_gates=True)
    for tensor, other in zip(found, expected, strict=True):
        assert relative_error(tensor, other.double()) < 1e-3


def shipped_blocks() -> list[tuple[str, LaunchConfig]]:
    """Every configuration of the fused GEMMs that the table ships for this device."""
    kernels = launch.TABLE[launch.architecture(DEVICE)]
    return [(name, config) for name in CHECKS for config in kernels[name].values()]


CHECKS = {
    "dual_gemm": test_dual_gemm_equals_float64,
    "gate_gemm": test_gate_gemm_equals_float64,
}


@pytest.mark.parametrize("kernel, config", shipped_blocks())
def test_each_shipped_block(kernel, config):
    """With several row blocks and a tail: the program order covers every tile."""
    with launch.trial(kernel, config):
        CHECKS[kernel](300, 72, 264, torch.bfloat16)


def test_more_row_blocks_than_a_group():
    blocks = shipped_config("dual_gemm", 700, DEVICE)[1].constants
    assert blocks["BLOCK_M"] * blocks["GROUP_M"] < 700
    test_dual_gemm_equals_float64(700, 32, 72, torch.float16)
    test_gate_gemm_equals_float64(700, 32, 72, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_dtypes_raise(dtype):
    with pytest.raises(ValueError, match=r"bfloat16 or float16.*cublas"):
        dual_gemm_swiglu(*forward_inputs(2, 8, 8, dtype), keep_gates=True)
    with pytest.raises(ValueError, match=r"bfloat16 or float16.*cublas"):
        gate_gemm_backward(*backward_inputs(2, 8, 8, dtype))


def test_mixed_dtypes_and_unfit_outputs_raise():
    dout, w3, a, b = backward_inputs(2, 8, 8, torch.float16)
    with pytest.raises(ValueError, match=r"one dtype .*w3 torch.bfloat16"):
        gate_gemm_backward(dout, w3.bfloat16(), a, b)
    with pytest.raises(ValueError, match="out_a is"):
        gate_gemm_backward(dout, w3, a, b, out_a=a.T)
