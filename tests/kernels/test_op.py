"""The op as PyTorch sees it: autograd, torch.compile, checkpointing, autocast, what it saves."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from kernels import POOL_MODES, dispatch, launch, projector_reference, token_adaptive_projector
from kernels import registration as ops
from kernels.tile_layout import square_shapes, tile_layout
from tests.kernels.inputs import (
    CHANNELS,
    DEVICE,
    HIDDEN,
    NAMES,
    WIDTH,
    eager,
    gradients,
    make_tiles,
    make_weights,
    relative_error,
)

GRID = (4, 5)


def inputs(tiles: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Tensor, dict[str, Tensor]]:
    x = make_tiles(tiles, GRID).to(dtype).to(DEVICE)
    return x, {name: weight.to(dtype).to(DEVICE) for name, weight in make_weights().items()}


def call(x: Tensor, weights: dict[str, Tensor], sides=(2, 5, 3), **options) -> Tensor:
    return token_adaptive_projector(x, sides, **weights, grid=GRID, **options)


def op_arguments(keep: str, sides: list[int]) -> tuple:
    x, weights = inputs(len(sides))
    leaves = [tensor.requires_grad_() for tensor in (x, *weights.values())]
    options = ops.Options("adaptive", keep, "torch", "auto", 1e-5).encode()
    shapes = torch.tensor(square_shapes(sides, GRID), dtype=torch.int64).reshape(-1, 4)
    return (leaves[0].flatten(0, 1), shapes, *leaves[1:], options)


@pytest.mark.parametrize("keep", ["save", "recompute"])
@pytest.mark.parametrize("sides", [[2, 5, 3], [4], []])
def test_registration(keep, sides):
    opcheck(ops.projector_forward, op_arguments(keep, sides))


def test_registration_of_the_backward():
    arguments = [
        a.detach() if isinstance(a, Tensor) else a for a in op_arguments("save", [2, 3, 1])
    ]
    x, shapes, *weights, options = arguments
    out, *saved, table = ops.projector_forward(*arguments)
    for needs in ([True] * 4, [False, True, False, True], [False, False, True, False]):
        opcheck(
            ops.projector_backward,
            (torch.ones_like(out), shapes, table, *saved, *weights, options, needs, len(x)),
        )


@pytest.mark.parametrize("backward", ["save", "recompute"])
@pytest.mark.parametrize("pool", POOL_MODES)
def test_gradcheck(pool, backward):
    x = make_tiles(3, (3, 4)).requires_grad_()
    weights = {name: weight.requires_grad_() for name, weight in make_weights().items()}

    def function(x: Tensor, *values: Tensor) -> Tensor:
        named = dict(zip(weights, values, strict=True))
        return token_adaptive_projector(
            x, [2, 5, 2], **named, grid=(3, 4), pool=pool, backward=backward
        )

    assert torch.autograd.gradcheck(function, (x, *weights.values()))


@pytest.mark.parametrize("backward", ["save", "recompute"])
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_forward_and_backward_equal_the_reference_in_float64(dtype, limit, backward):
    x, weights = inputs(dtype=dtype)
    upstream = torch.randn(38, WIDTH, generator=torch.Generator().manual_seed(2)).to(dtype)
    wide = {name: weight.double().cpu() for name, weight in weights.items()}
    expected = gradients(
        lambda x, w: projector_reference(x, [2, 5, 3], **w, grid=GRID),
        x.double().cpu(),
        wide,
        upstream,
    )
    found = gradients(lambda x, w: call(x, w, backward=backward), x, weights, upstream.to(DEVICE))
    for name, a, b in zip(("out", "x", *NAMES), found, expected, strict=True):
        assert relative_error(a, b) < limit, name


@pytest.mark.parametrize("frozen_x", [False, True])
def test_the_flop_counter_counts_what_the_eager_products_take(frozen_x):
    x, weights = inputs()
    upstream = torch.ones(38, WIDTH, device=DEVICE)

    def count(function) -> int:
        with FlopCounterMode(display=False) as counter:
            leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
            function(x.clone().requires_grad_(not frozen_x), leaves).backward(upstream)
        return counter.get_total_flops()

    expected = count(lambda x, w: eager(x, [2, 5, 3], w, GRID, "adaptive"))
    assert count(call) == expected > 0
    again = 2 * 38 * 2 * CHANNELS * HIDDEN  # two products of the forward
    assert count(lambda x, w: call(x, w, backward="recompute")) == expected + again


def test_forward_mode_raises_instead_of_a_tangent_of_zero():
    x, weights = inputs()
    with pytest.raises(ValueError, match=r"jvp.*backward"):
        torch.func.jvp(lambda x: call(x, weights), (x,), (torch.ones_like(x),))
    weight = weights["w2"]

    def of_weight(w2: Tensor) -> Tensor:
        return call(x, {**weights, "w2": w2})

    with pytest.raises(ValueError, match=r"jvp.*backward"):
        torch.func.jvp(of_weight, (weight,), (torch.ones_like(weight),))


@pytest.mark.parametrize("wanted", [("x",), ("norm_bias",), ("w2",), ("b3",), ("x", "w3")])
@pytest.mark.parametrize("backward", ["save", "recompute"])
def test_any_part_may_be_frozen(wanted, backward):
    """Each gradient is the same whatever else trains, and nothing else gets one."""
    x, weights = inputs()
    upstream = torch.ones(38, WIDTH, device=DEVICE)
    everything = dict(zip(("x", *NAMES), gradients(call, x, weights, upstream)[1:], strict=True))
    tensors = {"x": x, **weights}
    for name in wanted:
        tensors[name].requires_grad_()
    call(x, weights, backward=backward).backward(upstream)
    for name, tensor in tensors.items():
        if name not in wanted:
            assert tensor.grad is None, name
        else:
            assert relative_error(tensor.grad, everything[name]) < 1e-5, name


def test_a_frozen_tower_costs_nothing(monkeypatch):
    """Neither the pool's backward nor, with the norm frozen too, the products before it run."""
    x, weights = inputs()
    do = ops.steps("auto", "auto", "gate_gemm", 38, x)[0]

    def never(*_):
        raise AssertionError("ran for a gradient that nobody asked for")

    monkeypatch.setattr(do, "pool_backward", never)
    for name in NAMES:
        weights[name].requires_grad_()
    call(x, weights).sum().backward()
    monkeypatch.setattr(do, "norm_backward", never)
    for name in ("norm_weight", "norm_bias"):
        weights[name] = weights[name].detach()
    call(x, weights).sum().backward()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole_and_once(backend):
    """No graph break; another M, and after the second T another T, run what was compiled."""
    torch._dynamo.reset()
    x, weights = inputs(5)
    compiled = torch.compile(
        lambda x, sides, w: call(x, w, sides=sides).square(), fullgraph=True, backend=backend
    )

    def compare(sides: list[int]) -> None:
        host, tiles = torch.tensor(sides), x[: len(sides)]
        upstream = torch.ones(sum(n * n for n in sides), WIDTH, device=DEVICE)
        found = gradients(lambda x, w: compiled(x, host, w), tiles, weights, upstream)
        expected = gradients(lambda x, w: call(x, w, sides=host).square(), tiles, weights, upstream)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)

    compare([2, 5, 3])
    with torch.compiler.set_stance("fail_on_recompile"):
        compare([1, 1, 8])
    compare([4, 4])
    with torch.compiler.set_stance("fail_on_recompile"):
        compare([3, 2, 4, 1, 1])
        compare([6, 2])


def test_no_grad_is_compiled_too():
    torch._dynamo.reset()
    counter = CompileCounter()
    x, weights = inputs()
    compiled = torch.compile(
        lambda x: call(x, weights, sides=torch.tensor([2, 5, 3])), backend=counter
    )
    with torch.no_grad(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        torch.testing.assert_close(compiled(x), call(x, weights))
    assert counter.frame_count == 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    x, weights = inputs()
    upstream = torch.ones(38, WIDTH, device=DEVICE)

    def checkpointed(x: Tensor, w: dict[str, Tensor]) -> Tensor:
        return checkpoint(lambda x, *v: call(x, dict(zip(w, v, strict=True))), x, *w.values(),
                          use_reentrant=reentrant)  # fmt: skip

    found = gradients(checkpointed, x, weights, upstream)
    expected = gradients(call, x, weights, upstream)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_autocast_computes_in_half_precision_and_grads_stay_wide():
    x, weights = inputs()
    leaves = {name: weight.requires_grad_() for name, weight in weights.items()}
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        out = call(x, leaves)
        assert out.dtype == torch.bfloat16
        out.float().sum().backward()
    assert {leaf.grad.dtype for leaf in leaves.values()} == {torch.float32}
    found = {name: leaf.grad.clone() for name, leaf in leaves.items()}
    expected = gradients(call, x, weights, torch.ones(38, WIDTH))
    assert relative_error(out.detach(), expected[0]) < 1e-2
    for name, gradient in zip(NAMES, expected[2:], strict=True):
        assert relative_error(found[name], gradient) < 2e-2, name


def saved_bytes(x: Tensor, weights: dict[str, Tensor], sides: list[int], **options) -> int:
    """Bytes of what autograd keeps besides the inputs."""
    given = {tensor.data_ptr() for tensor in (x, *weights.values())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in given:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = call(x, weights, sides=sides, **options)
    assert out.requires_grad
    return sum(kept.values())


def test_what_is_saved_for_backward():
    """`save`: pooled and both gates; `recompute`: pooled; both: statistics and the layout."""
    x, weights = inputs(dtype=torch.bfloat16)
    weights = {name: weight.requires_grad_() for name, weight in weights.items()}
    sides, rows = [8, 8, 8], 192
    small = 2 * 4 * rows + 4 * (rows + 8 * 3) + 8 * 4 * 3  # mean and rstd, the layout, the shapes
    assert saved_bytes(x, weights, sides, backward="recompute") == 2 * rows * CHANNELS + small
    assert saved_bytes(x, weights, sides) == 2 * rows * (CHANNELS + 2 * HIDDEN) + small


def test_the_same_bits_every_time():
    x, weights = inputs()
    upstream = torch.randn(38, WIDTH, device=DEVICE)
    first, second = (gradients(call, x, weights, upstream) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_strided_inputs_and_gradients_give_the_same():
    x, weights = inputs()
    upstream = torch.randn(38, WIDTH, device=DEVICE)
    expected = gradients(call, x, weights, upstream)
    for name in NAMES:
        strided = torch.stack([weights[name], weights[name]], dim=-1)[..., 0]
        assert not strided.is_contiguous()
        weights[name] = strided
    spread = torch.stack([x, x], dim=-1)[..., 0]
    found = gradients(call, spread, weights, torch.stack([upstream] * 2, dim=-1)[..., 0])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_norm_in_float32_beside_half_precision():
    x, weights = inputs(dtype=torch.bfloat16)
    expected = call(x, weights)
    for name in ("norm_weight", "norm_bias"):
        weights[name] = weights[name].float().requires_grad_()
    found = call(x, weights)
    assert torch.equal(found, expected)
    found.sum().backward()
    assert weights["norm_weight"].grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backward": "none"}, "backward is 'none'.* save, recompute"),
        ({"impl": "cuda"}, "impl is 'cuda'.* auto, triton, torch"),
        ({"gemm": "cutlass"}, "gemm is 'cutlass'.* auto, cublas, fused"),
        ({"gemm": "fused", "impl": "torch"}, "gemm is 'fused'.*impl 'torch'"),
        ({"sides": torch.tensor([2.0, 5.0, 3.0])}, "tile_sides is torch.float32"),
        ({"sides": torch.tensor([2, 5, -3])}, r"tile_sides\[2\] is -3"),
        ({"sides": torch.tensor([[2, 5, 3]])}, r"tile_sides has shape \(1, 3\)"),
        ({"sides": None}, "tile_sides is None; .*a list"),
        ({"sides": 3}, "tile_sides is 3; .*a list"),
        ({"sides": [2, 5, 1025]}, r"largest side is 1025.* 1024"),
    ],
)
def test_bad_choices_and_sides(options, message):
    x, weights = inputs()
    with pytest.raises(ValueError, match=message):
        call(x, weights, **options)


def test_more_tokens_than_an_int32_counts_are_refused():
    with pytest.raises(ValueError, match=r"2148532224 tokens.*2\^31 tokens"):
        tile_layout(square_shapes([1024] * 2049, GRID), "adaptive", torch.device("cpu"))


def test_triton_says_what_it_cannot_run(monkeypatch):
    x, weights = inputs(dtype=torch.float64)
    with pytest.raises(ValueError, match="bfloat16, float16 and float32"):
        call(x, weights, impl="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="to a GPU"):
        dispatch.implementation("triton", torch.device("cpu"), torch.float32)
    monkeypatch.setattr(dispatch, "triton_found", lambda: False)
    with pytest.raises(ValueError, match="triton is not installed"):
        dispatch.implementation("triton", torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    ("triton", "capability", "trial", "expected", "reason"),
    [
        (False, (9, 0), None, "torch", "triton is not installed"),
        (True, (7, 5), None, "torch", "older than compute capability 8.0"),
        (True, (8, 0), "there is no C compiler", "torch", "there is no C compiler"),
        (True, (8, 0), None, "triton", None),
    ],
)
def test_auto_runs_triton_where_it_can(monkeypatch, triton, capability, trial, expected, reason):
    monkeypatch.setattr(dispatch, "triton_found", lambda: triton)
    monkeypatch.setattr(dispatch, "launch_obstacle", lambda _: trial)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    dispatch._obstacle.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            found = dispatch.implementation("auto", torch.device("cuda", 0), torch.float32)
            assert found == expected
    dispatch._obstacle.cache_clear()
    assert len(caught) == (1 if reason else 0)
    assert not reason or reason in str(caught[0].message)


def test_an_unknown_architecture_gets_the_safe_default_and_one_warning(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (12, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a new card")
    launch._cuda_architecture.cache_clear()
    with pytest.warns(UserWarning, match="launch configurations .*sm_120"):
        assert launch.architecture(torch.device("cuda", 0)) == launch.SAFE_DEFAULT
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert launch.architecture(torch.device("cuda", 0)) == launch.SAFE_DEFAULT
    launch._cuda_architecture.cache_clear()


def test_buckets_of_rows_choose_the_largest_reached():
    small, large = launch.LaunchConfig({"A": 1}), launch.LaunchConfig({"A": 2})
    table = {launch.INTERPRETED: {"kernel": {0: small, 4: large}}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "TABLE", table)
        for rows, expected in ((1, small), (15, small), (16, large), (10**6, large)):
            assert launch.shipped_config("kernel", rows, torch.device("cpu"))[1] is expected


def test_the_op_needs_no_triton():
    """Only asking for the kernels imports triton."""
    program = (
        "import sys, torch; sys.modules['triton'] = None\n"
        "from kernels import token_adaptive_projector as p\n"
        "w = [torch.ones(s) for s in ((4,), (4,), (6, 4), (6,), (6, 4), (6,), (3, 6), (3,))]\n"
        "print(p(torch.ones(1, 4, 4), [2], *w, grid=(2, 2)).shape)"
    )
    env = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False
    )
    assert "torch.Size([4, 3])" in done.stdout, done.stderr
