"""The least time each way of running the projector can take: FLOPs, bytes and floors, calculated.

A way (see WAYS) is a list of steps; a step is one pass over memory or one matrix product, and can
be no faster than its FLOPs at the GPU's matrix rate or its bytes at its bandwidth, whichever takes
longer. The floor is the sum over the steps. Every step counts each tensor it must read or write
once. Left out: launches, and the copies with which eager code sorts
mixed tiles by side (so mixed cases look better for it than they are); FLOPs outside matrix products
and small vectors, which are below 1 % of the rest.

Sizes, in elements: X = T*H*W*C, U = the up-sampled X of the resize mode, MC = M*C, MF = M*F,
MD = M*D.
"""

from collections.abc import Callable
from dataclasses import dataclass

from kernels.profile.cases import Case
from kernels.tables import pooling_table

# "cublas" is this repository's op as it ships, "recompute" that with less memory, "fused" what the
# fused matrix products make of it at cuBLAS' speed; the others are what it is compared with.
WAYS = ("eager", "compile", "cublas", "fused", "recompute")
MODES = ("forward", "backward", "both")


@dataclass(frozen=True)
class Peaks:
    """The GPU's ceilings: FLOP/s of matrix products, bytes/s of copies (read plus written)."""

    flops: float
    bandwidth: float


@dataclass(frozen=True)
class Step:
    """One pass over memory or one matrix product; `flops` are those of matrix products only."""

    name: str
    bytes: float
    flops: float = 0.0

    def floor_s(self, peaks: Peaks) -> float:
        """Seconds it takes at least."""
        return max(self.flops / peaks.flops, self.bytes / peaks.bandwidth)


class _Sizes:
    """Bytes of the tensors of one case; see the module's legend."""

    def __init__(self, case: Case) -> None:
        element, tiles, m = case.element_bytes, case.tiles, case.rows
        self.m, self.element = m, element
        self.c, self.f, self.d = case.channels, case.hidden, case.width
        self.x = tiles * case.patches * case.channels * element
        pooled_from = POOLED_FROM[case.pool]
        self.u = sum(pooled_from(n, case.grid) for n in case.sides) * case.channels * element
        self.mc, self.mf, self.md = m * self.c * element, m * self.f * element, m * self.d * element
        # A tile whose grid n divides is pooled without resizing: then nothing is up-sampled.
        self.resized = self.u != self.x

    def gemm(self, name: str, m: int, n: int, k: int) -> Step:
        """[m, k] x [k, n]: operands read once, the product written once."""
        return Step(name, (m * k + k * n + m * n) * self.element, 2.0 * m * n * k)


def _upsampled(n: int, grid: tuple[int, int]) -> int:
    height, width = (-(-size // n) * n for size in grid)
    return height * width


POOLED_FROM: dict[str, Callable[[int, tuple[int, int]], int]] = {
    "adaptive": lambda n, grid: grid[0] * grid[1],
    "resize": _upsampled,
}
"""Mode -> n and the grid -> what torch takes the averages of, per tile and channel."""


def steps(case: Case, way: str, mode: str, frozen: bool = False) -> list[Step]:
    """What one call does. frozen: x needs no gradient."""
    if mode == "both":
        return steps(case, way, "forward", frozen) + steps(case, way, "backward", frozen)
    sizes = _Sizes(case)
    return _FORWARD[way](sizes) if mode == "forward" else _BACKWARD[way](sizes, frozen)


def floor_s(case: Case, way: str, mode: str, peaks: Peaks, frozen: bool = False) -> float:
    """Seconds one call takes at least."""
    return sum(step.floor_s(peaks) for step in steps(case, way, mode, frozen))


def model_flops(case: Case, mode: str) -> float:
    """FLOPs of the matrix products the result needs; not those that recomputing repeats."""
    sizes = _Sizes(case)
    forward = 2.0 * sizes.m * sizes.f * (2 * sizes.c + sizes.d)
    return forward * {"forward": 1, "backward": 2, "both": 3}[mode]


def bytes_moved(case: Case, way: str, mode: str, frozen: bool = False) -> float:
    """Bytes of all steps, the operands of matrix products included."""
    return sum(step.bytes for step in steps(case, way, mode, frozen))


def _pool(s: _Sizes) -> list[Step]:
    """Pooling as torch writes it; resizing writes the up-sampled patches and reads them again."""
    if s.resized:
        return [Step("upsample", s.x + s.u), Step("pool", s.u + s.mc)]
    return [Step("pool", s.x + s.mc)]


def _pool_backward(s: _Sizes) -> list[Step]:
    if s.resized:
        return [Step("pool backward", s.mc + s.u), Step("upsample backward", s.u + s.x)]
    return [Step("pool backward", s.mc + s.x)]


def _gates(s: _Sizes) -> list[Step]:
    return [s.gemm("a", s.m, s.f, s.c), s.gemm("b", s.m, s.f, s.c)]


def _eager_forward(s: _Sizes) -> list[Step]:
    """One kernel per torch op."""
    return [
        *_pool(s),
        Step("norm", 2 * s.mc),
        *_gates(s),
        Step("silu: a to silu(a)", 2 * s.mf),
        Step("product: silu(a), b to s", 3 * s.mf),
        s.gemm("out", s.m, s.d, s.f),
    ]


def _compile_forward(s: _Sizes) -> list[Step]:
    """Inductor joins silu and product; pooling and norm stay apart, as the norm needs whole rows.

    Its lowering of avg_pool2d stores an input that is more than a plain read: the resize mode is
    written and read as in eager.
    """
    return [
        *_pool(s),
        Step("norm", 2 * s.mc),
        *_gates(s),
        Step("swiglu: a, b to s", 3 * s.mf),
        s.gemm("out", s.m, s.d, s.f),
    ]


def _cublas_forward(s: _Sizes) -> list[Step]:
    """This op as it ships: pooling and norm in one pass, SwiGLU in one between cuBLAS' products."""
    return [
        Step("pool + norm: x to pooled, normed", s.x + 2 * s.mc),
        *_gates(s),
        Step("swiglu: a, b to s", 3 * s.mf),
        s.gemm("out", s.m, s.d, s.f),
    ]


def _fused_forward(s: _Sizes) -> list[Step]:
    """X is read once, one [M, C] written; what follows happens around the matrix products."""
    return [Step("pool + norm", s.x + s.mc), *_gates(s), s.gemm("out", s.m, s.d, s.f)]


def _backward_gemms(s: _Sizes) -> list[Step]:
    return [
        s.gemm("ds", s.m, s.f, s.d),
        s.gemm("dw3", s.d, s.f, s.m),
        s.gemm("dw1", s.f, s.c, s.m),
        s.gemm("dw2", s.f, s.c, s.m),
        s.gemm("dnormed of a", s.m, s.c, s.f),
        s.gemm("dnormed of b", s.m, s.c, s.f),
    ]


def _eager_backward(s: _Sizes, frozen: bool) -> list[Step]:
    """One kernel per torch op, plus one per bias."""
    found = [
        *_backward_gemms(s),
        Step("db3: dout", s.md),
        Step("product backward: ds, b to dsilu; ds, silu(a) to db", 6 * s.mf),
        Step("silu backward: dsilu, a to da", 3 * s.mf),
        Step("db1, db2: da, db", 2 * s.mf),
        Step("sum of the two dnormed", 3 * s.mc),
        Step("norm's weight and bias: dnormed, pooled", 2 * s.mc),
    ]
    if frozen:
        return found
    return [*found, Step("norm backward: dnormed, pooled to dpooled", 3 * s.mc), *_pool_backward(s)]


def _compile_backward(s: _Sizes, frozen: bool) -> list[Step]:
    """What can share a pass does: db1 and db2 in SwiGLU's, the sum of both dnormed in its readers.

    The norm's weight and bias are sums over rows, its input's gradient needs sums along rows: two
    passes.
    """
    found = [
        *_backward_gemms(s),
        Step("db3: dout", s.md),
        Step("swiglu backward: ds, a, b to da, db", 5 * s.mf),
        Step("norm's weight and bias: both dnormed, pooled", 3 * s.mc),
    ]
    if frozen:
        return found
    return [
        *found,
        Step("norm backward: both dnormed, pooled to dpooled", 4 * s.mc),
        *_pool_backward(s),
    ]


def _cublas_backward(s: _Sizes, frozen: bool, recompute: bool = False) -> list[Step]:
    """This op as it ships; the norm's pass also writes the normalised rows for dw1 and dw2.

    recompute: those rows are there already.
    """
    normed = 0 if recompute else s.mc
    found = [
        *_backward_gemms(s),
        Step("sum of the two dnormed, in the second product", s.mc),
        Step("db3: dout", s.md),
        Step("swiglu backward: ds, a, b to da, db, s", 6 * s.mf),
        Step(
            "norm backward: dnormed, pooled to dpooled, normed",
            (2 if frozen else 3) * s.mc + normed,
        ),
    ]
    return found if frozen else [*found, Step("pool backward: dpooled to dx", s.mc + s.x)]


def _fused_backward(s: _Sizes, frozen: bool) -> list[Step]:
    """SwiGLU and the biases around the matrix products; both dnormed in one accumulator.

    Counted as free, so that this stays a floor: db3, and the normalised rows again for dw1, dw2.
    """
    reads = Step("norm backward: dnormed, pooled", 2 * s.mc)
    if frozen:
        return [*_backward_gemms(s), reads]
    return [
        *_backward_gemms(s),
        reads,
        Step("dpooled, written and read", 2 * s.mc),
        Step("pool backward: dx", s.x),
    ]


def _recompute_backward(s: _Sizes, frozen: bool) -> list[Step]:
    """The normalised rows and both gates from the pooled rows, then as `_cublas_backward`."""
    again = [Step("norm again", 2 * s.mc), *_gates(s)]
    return [*again, *_cublas_backward(s, frozen, recompute=True)]


_FORWARD: dict[str, Callable[[_Sizes], list[Step]]] = {
    "eager": _eager_forward,
    "compile": _compile_forward,
    "cublas": _cublas_forward,
    "fused": _fused_forward,
    "recompute": _cublas_forward,
}
_BACKWARD: dict[str, Callable[[_Sizes, bool], list[Step]]] = {
    "eager": _eager_backward,
    "compile": _compile_backward,
    "cublas": _cublas_backward,
    "fused": _fused_backward,
    "recompute": _recompute_backward,
}


def saved_bytes(case: Case, way: str, frozen: bool = False) -> int:
    """Bytes autograd keeps from forward to backward, parameters left out.

    x counts where the way keeps it: nothing else needs the vision tower's last output.
    """
    s = _Sizes(case)
    statistics = 2 * s.m * 4  # mean and rstd, float32
    if way in ("cublas", "fused"):  # pooled, a, b
        return s.mc + 2 * s.mf + statistics
    if way == "recompute":  # pooled
        return s.mc + statistics
    pooled_from = 0 if frozen else (s.u if s.resized else s.x)
    gates = {"eager": 4, "compile": 3}[way]  # a, b, s, and in eager silu(a)
    return pooled_from + 2 * s.mc + gates * s.mf + statistics  # 2: pooled, normed


def pool_norm_bytes(case: Case) -> int:
    """Bytes the kernel of pooling and LayerNorm moves: x, pooled, normed, mean and rstd."""
    s = _Sizes(case)
    return s.x + 2 * s.mc + 2 * s.m * 4


def pool_norm_flops(case: Case) -> float:
    """FLOPs of the same kernel: 2 per patch, channel and token that uses it, about 8 per value."""
    height, width = case.grid
    taps = {
        n: int(
            (pooling_table(n, height, case.pool) != 0).sum()
            * (pooling_table(n, width, case.pool) != 0).sum()
        )
        for n in set(case.sides)
    }
    return case.channels * (2.0 * sum(taps[n] for n in case.sides) + 8.0 * case.rows)
