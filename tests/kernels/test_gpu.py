"""The op on a GPU at real shapes. `gpu`: skipped where there is none."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels import projector_reference, token_adaptive_projector
from kernels.tile_layout import square_shapes, tile_layout
from tests.kernels.inputs import eager, gradients, make_tiles, make_weights, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
GRID, CHANNELS, HIDDEN, WIDTH = (27, 27), 1152, 3456, 2048
SIDES = [8, 12, 16, 16, 9, 27, 1, 30]
GPU = torch.device("cuda")
triton_impl = pytest.importorskip("kernels.triton_impl")


def real_inputs(dtype: torch.dtype, tiles: int = len(SIDES)) -> tuple[Tensor, dict[str, Tensor]]:
    weights = make_weights(channels=CHANNELS, hidden=HIDDEN, width=WIDTH)
    for name, weight in weights.items():
        if weight.ndim == 2:
            weight /= weight.shape[1] ** 0.5
        weights[name] = weight.to(dtype).to(GPU)
    return make_tiles(tiles, GRID, channels=CHANNELS).to(dtype).to(GPU), weights


def upstream(dtype: torch.dtype, sides=SIDES) -> Tensor:
    generator = torch.Generator(GPU).manual_seed(3)
    rows = sum(n * n for n in sides)
    return torch.randn(rows, WIDTH, generator=generator, device=GPU).to(dtype)


@pytest.mark.parametrize("pool", ["adaptive", "resize"])
@pytest.mark.parametrize("backward", ["save", "recompute"])
@pytest.mark.parametrize(
    "dtype, gemm, limit",
    [
        (torch.float32, "cublas", 1e-5),
        (torch.float16, "cublas", 2e-3),
        (torch.float16, "fused", 2e-3),
        (torch.bfloat16, "cublas", 1e-2),
        (torch.bfloat16, "fused", 1e-2),
    ],
)
def test_equals_float64_and_at_most_twice_the_error_of_eager(dtype, gemm, limit, backward, pool):
    torch.backends.cuda.matmul.allow_tf32 = False
    x, weights = real_inputs(dtype)
    grad = upstream(dtype)

    def reference(x: Tensor, w: dict[str, Tensor]) -> Tensor:
        return projector_reference(x, SIDES, **w, grid=GRID, pool=pool)

    def torch_ops(x: Tensor, w: dict[str, Tensor]) -> Tensor:
        return eager(x, SIDES, w, GRID, pool)

    def ours(x: Tensor, w: dict[str, Tensor]) -> Tensor:
        return token_adaptive_projector(
            x, SIDES, **w, grid=GRID, pool=pool, impl="triton", gemm=gemm, backward=backward
        )

    wide = {name: weight.double() for name, weight in weights.items()}
    expected = gradients(reference, x.double(), wide, grad)
    separate = gradients(torch_ops, x, weights, grad)
    found = gradients(ours, x, weights, grad)
    for name, a, b, c in zip(("out", "x", *weights), found, separate, expected, strict=True):
        error = relative_error(a, c)
        assert error < limit, name
        assert error <= 2 * relative_error(b, c) + 1e-7, name


@pytest.mark.parametrize("gemm", ["cublas", "fused"])
def test_the_same_bits_in_every_run(gemm):
    x, weights = real_inputs(torch.bfloat16)
    grad = upstream(torch.bfloat16)

    def call(x: Tensor, w: dict[str, Tensor]) -> Tensor:
        return token_adaptive_projector(x, SIDES, **w, grid=GRID, gemm=gemm)

    first = gradients(call, x, weights, grad)
    for _ in range(5):
        again = gradients(call, x, weights, grad)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_tile_gives_the_same_wherever_it_lies():
    """To the bit in what our kernels compute alone; cuBLAS may split a product by position."""
    x, weights = real_inputs(torch.bfloat16)
    order = list(reversed(range(len(SIDES))))
    sides = [SIDES[i] for i in order]

    def permuted(rows: Tensor) -> Tensor:
        blocks = rows.split([n * n for n in SIDES])
        return torch.cat([blocks[i] for i in order])

    there, back = (
        tile_layout(square_shapes(s, GRID), "adaptive", x.device) for s in (SIDES, sides)
    )
    norms = (weights["norm_weight"], weights["norm_bias"], 1e-5)
    pooled, normed, _, _ = triton_impl.pool_norm(x.flatten(0, 1), there, *norms)
    other_pooled, other_normed, _, _ = triton_impl.pool_norm(x[order].flatten(0, 1), back, *norms)
    assert torch.equal(other_pooled, permuted(pooled))
    assert torch.equal(other_normed, permuted(normed))
    dx = triton_impl.pool_backward(pooled, there).view_as(x)
    moved = triton_impl.pool_backward(permuted(pooled), back).view_as(x)
    assert torch.equal(moved, dx[order])
    out = token_adaptive_projector(x, SIDES, **weights, grid=GRID)
    other = token_adaptive_projector(x[order], sides, **weights, grid=GRID)
    assert relative_error(other, permuted(out)) < 1e-2


def test_compiled_once_for_every_batch():
    torch._dynamo.reset()
    x, weights = real_inputs(torch.bfloat16)
    weights = {name: weight.requires_grad_() for name, weight in weights.items()}

    def step(x: Tensor, sides: Tensor) -> Tensor:
        return token_adaptive_projector(x, sides, **weights, grid=GRID).float().square().mean()

    compiled = torch.compile(step, fullgraph=True)
    for sides in ([8, 12, 16], [16, 16, 8], [12, 12], [8, 9, 10, 11]):
        host = torch.tensor(sides)
        if len(sides) != 2:
            torch.testing.assert_close(compiled(x[: len(sides)], host), step(x[: len(sides)], host))
        compiled(x[: len(sides)], host).backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(x[:5], torch.tensor([16, 8, 3, 8, 2])).backward()


@pytest.mark.parametrize("gemm", ["cublas", "fused"])
def test_more_elements_than_an_int32_counts(gemm):
    """M * F beyond 2^31: 2560 tiles of 16 x 16 tokens. Needs about 60 GB."""
    free, _ = torch.cuda.mem_get_info()
    if free < 64e9:
        pytest.skip("needs 64 GB of free GPU memory")
    tiles, side = 2560, 16
    _, weights = real_inputs(torch.bfloat16, 1)
    x = torch.randn(tiles, 27 * 27, CHANNELS, device=GPU, dtype=torch.bfloat16)
    assert tiles * side**2 * HIDDEN > 2**31 and x.numel() > 2**31
    grad = torch.ones(tiles * side**2, WIDTH, device=GPU, dtype=torch.bfloat16)
    x.requires_grad_()
    sides = [side] * tiles
    out = token_adaptive_projector(x, sides, **weights, grid=GRID, backward="recompute", gemm=gemm)
    out.backward(grad)
    last = slice(tiles - 2, tiles)
    part = x.detach()[last].requires_grad_()
    expected = token_adaptive_projector(part, [side] * 2, **weights, grid=GRID)
    expected.backward(grad[: 2 * side**2])
    assert relative_error(out.detach()[-2 * side**2 :], expected.detach()) < 1e-2
    assert relative_error(x.grad[last], part.grad) < 1e-2


SANITIZED = """
import torch
from tests.kernels.test_gpu import GRID, SIDES, real_inputs
from kernels import token_adaptive_projector
for sides in (SIDES, [16] * 33):  # the fused products' blocks for few rows and for many
    x, weights = real_inputs(torch.bfloat16, len(sides))
    for w in (x, *weights.values()):
        w.requires_grad_()
    for pool in ("adaptive", "resize"):
        for gemm in ("cublas", "fused"):
            out = token_adaptive_projector(x, sides, **weights, grid=GRID, pool=pool, gemm=gemm)
            out.sum().backward()
torch.cuda.synchronize()
"""
# Memory that cuBLAS or torch wrote counts as uninitialised where only our kernels are watched: each
# step gets tensors copied from the host.
INITIALISED = """
import torch
from tests.kernels.test_gpu import GRID, SIDES, real_inputs
from kernels import triton_impl as do
from kernels.tile_layout import square_shapes, tile_layout
gpu = torch.device("cuda")
give = lambda *shape: torch.randn(*shape).bfloat16().to(gpu)
x, w = real_inputs(torch.bfloat16)
rows = sum(n * n for n in SIDES)
for pool in ("adaptive", "resize"):
    layout = tile_layout(square_shapes(SIDES, GRID), pool, gpu)
    weight, bias = w["norm_weight"], w["norm_bias"]
    pooled, _, mean, rstd = do.pool_norm(x.flatten(0, 1), layout, weight, bias, 1e-5)
    norms = (pooled, mean, rstd, weight, bias)
    do.norm(*norms)
    do.norm_backward(give(rows, 1152), *norms, True, True)
    do.pool_backward(give(rows, 1152), layout)
gate, value, grad = (give(rows, 3456) for _ in range(3))
do.swiglu(gate, value)
do.swiglu_backward(grad, gate, value)
torch.cuda.synchronize()
"""


@pytest.mark.parametrize(
    "tool, program", [("memcheck", SANITIZED), ("racecheck", SANITIZED), ("initcheck", INITIALISED)]
)
def test_compute_sanitizer_finds_nothing_in_the_kernels(tool, program):
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        pytest.skip("compute-sanitizer is not installed")
    kernels = "regex=pool_|norm_|swiglu|column_sum|_dual_gemm|_gate_gemm"
    done = subprocess.run(
        [sanitizer, "--tool", tool, "--kernel-name", kernels, "--error-exitcode", "86",
         sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(Path.cwd()), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
