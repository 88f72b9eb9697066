"""The least time each way of running the projector can take: FLOPs, bytes and floors, calculated.

A way (see WAYS) is a list of steps; a step is one pass over memory or one matrix product, and can
be no faster than its FLOPs at the GPU's matrix rate or its bytes at its bandwidth, whichever takes
longer. What fits in the L2 cache may never reach memory: such a step is bound by its FLOPs alone
(the inputs come from memory all the same: what is profiled rotates them). Ways are compared as if
everything went to memory (`Peaks.past_l2`): bounds have no ratio. Every step counts each tensor it
must read or write once. Left out: launches, and FLOPs outside matrix products and small vectors,
which are below 1 % of the rest.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from kernels.profile.cases import Case

# "cublas" is this repository's op as it ships, "recompute" that with less memory, "fused" what the
# fused matrix products make of it at cuBLAS' speed; the others are what it is compared with.
WAYS = ("eager", "compile", "cublas", "fused", "recompute")
MODES = ("forward", "backward", "both")


@dataclass(frozen=True)
class Peaks:
    """The GPU's ceilings: FLOP/s of matrix products, bytes/s of copies (read plus written).

    l2: bytes of its L2 cache; with 0 every step is taken to reach memory.
    """

    flops: float
    bandwidth: float
    l2: float = 0.0

    @property
    def past_l2(self) -> "Peaks":
        """The same where nothing is kept in L2: an estimate where something is, no bound."""
        return replace(self, l2=0.0)


@dataclass(frozen=True)
class Step:
    """One pass over memory or one matrix product; `flops` are those of matrix products only."""

    name: str
    bytes: float
    flops: float = 0.0

    def floor_s(self, peaks: Peaks) -> float:
        """Seconds it takes at least."""
        in_memory = self.bytes / peaks.bandwidth if self.bytes > peaks.l2 else 0.0
        return max(self.flops / peaks.flops, in_memory)


class Sizes:
    """Bytes of the tensors of one case: x [T, H*W, C]; u, x up-sampled by the resize mode; mc
    [M, C], mf [M, F], md [M, D]; weights, all of them."""

    def __init__(self, case: Case) -> None:
        self.m, self.element = case.rows, case.element_bytes
        self.c, self.f, self.d = case.channels, case.hidden, case.width
        self.x = case.tiles * case.patches * self.c * self.element
        self.u = (
            self.c * self.element * sum(POOLED_FROM[case.pool](n, case.grid) for n in case.sides)
        )
        self.mc, self.mf, self.md = (self.m * k * self.element for k in (self.c, self.f, self.d))
        self.weights = self.f * (2 * self.c + self.d) * self.element
        # A tile whose grid n divides is pooled without resizing: then nothing is up-sampled.
        self.resized = self.u != self.x
        self.sides = len(set(case.sides))

    def gemm(self, name: str, m: int, n: int, k: int) -> Step:
        """[m, k] x [k, n]: operands read once, the product written once."""
        return Step(name, (m * k + k * n + m * n) * self.element, 2.0 * m * n * k)

    @property
    def gates(self) -> list[Step]:
        return [self.gemm(name, self.m, self.f, self.c) for name in ("a", "b")]

    @property
    def sorting(self) -> dict[str, float]:
        """Copies with which eager code sorts mixed tiles by side, and the rows back."""
        return {"sort tiles": 2 * self.x, "sort rows": 4 * self.md} if self.sides > 1 else {}

    @property
    def unsorting(self) -> dict[str, float]:
        """In backward: a gradient of x per side, zeros but for its tiles, and their sum."""
        full = (self.sides + 2 + 3 * (self.sides - 1)) * self.x
        return {"unsort tiles": full, "unsort rows": 2 * self.md} if self.sides > 1 else {}

    @property
    def pool(self) -> dict[str, float]:
        """Pooling as torch writes it; resizing writes up-sampled patches and reads them again."""
        if self.resized:
            return {"upsample": self.x + self.u, "pool": self.u + self.mc}
        return {"pool": self.x + self.mc}


def _upsampled(n: int, grid: tuple[int, int]) -> int:
    height, width = (-(-size // n) * n for size in grid)
    return height * width


POOLED_FROM: dict[str, Callable[[int, tuple[int, int]], int]] = {
    "adaptive": lambda n, grid: grid[0] * grid[1],
    "resize": _upsampled,
}
"""Mode -> n and the grid -> what torch takes the averages of, per tile and channel."""

Passes = Callable[[Sizes], dict[str, float]]  # name of a pass over memory -> its bytes

# Eager: a kernel per torch op. Inductor joins silu and product; pooling and norm stay apart, as the
# norm needs whole rows, and avg_pool2d stores an input that is more than a plain read. This op: one
# pass each, named as its kernels. Fused: what follows pooling happens around the matrix products.
_FORWARD: dict[str, Passes] = {
    "eager": lambda s: s.sorting | s.pool | {"norm": 2 * s.mc, "silu": 2 * s.mf, "mul": 3 * s.mf},
    "compile": lambda s: s.pool | {"norm": 2 * s.mc, "swiglu": 3 * s.mf},
    "cublas": lambda s: {"pool_norm": s.x + 2 * s.mc, "swiglu": 3 * s.mf},
    "fused": lambda s: {"pool_norm": s.x + s.mc},
}
# Eager: a kernel per bias more. Inductor: both bias sums in SwiGLU's pass, the sum of both dnormed
# in its readers; the norm's weight needs sums over rows, its input along rows: two passes. This op:
# the norm's pass also writes the normalised rows for dw1 and dw2. Fused: both dnormed in one
# accumulator; counted as free, so that this stays a floor: db3, and the normalised rows again.
_BACKWARD: dict[str, Passes] = {
    "eager": lambda s: {
        **{"db3": s.md, "mul_backward": 6 * s.mf, "silu_backward": 3 * s.mf, "db1, db2": 2 * s.mf},
        **{"sum of both dnormed": 3 * s.mc, "norm's weights": 2 * s.mc},
    },
    "compile": lambda s: {"db3": s.md, "swiglu_backward": 5 * s.mf, "norm's weights": 3 * s.mc},
    "cublas": lambda s: {
        **{"sum of both dnormed": s.mc, "db3": s.md, "swiglu_backward": 6 * s.mf},
        "norm_backward": 3 * s.mc,
    },
    "fused": lambda s: {"norm_backward": 2 * s.mc},
}
# What comes on top where x needs a gradient.
_BACKWARD_OF_X: dict[str, Passes] = {
    "eager": lambda s: {"norm_backward": 3 * s.mc} | _pool_backward(s) | s.unsorting,
    "compile": lambda s: {"norm_backward": 4 * s.mc} | _pool_backward(s),
    "cublas": lambda s: {"norm_backward": 4 * s.mc, "pool_backward": s.mc + s.x},
    "fused": lambda s: {"dpooled": 2 * s.mc, "pool_backward": s.x},
}


def _pool_backward(s: Sizes) -> dict[str, float]:
    return {f"{name}_backward": size for name, size in s.pool.items()}


def steps(case: Case, way: str, mode: str, frozen: bool = False) -> list[Step]:
    """What one call does. frozen: x needs no gradient."""
    if mode == "both":
        return steps(case, way, "forward", frozen) + steps(case, way, "backward", frozen)
    s, recompute = Sizes(case), way == "recompute"
    way = "cublas" if recompute else way
    if mode == "forward":
        products = [*s.gates, s.gemm("out", s.m, s.d, s.f)]
        return [*products, *(Step(*each) for each in _FORWARD[way](s).items())]
    products = [
        *(s.gemm("ds", s.m, s.f, s.d), s.gemm("dw3", s.d, s.f, s.m)),
        *(s.gemm(name, s.f, s.c, s.m) for name in ("dw1", "dw2")),
        *(s.gemm(f"dnormed of {name}", s.m, s.c, s.f) for name in "ab"),
    ]
    passes = _BACKWARD[way](s) | ({} if frozen else _BACKWARD_OF_X[way](s))
    if recompute:  # the normalised rows and both gates from the pooled rows
        passes = passes | {"norm": 2 * s.mc, "norm_backward": passes["norm_backward"] - s.mc}
        products += s.gates
    return [*products, *(Step(*each) for each in passes.items())]


def floor_s(case: Case, way: str, mode: str, peaks: Peaks, frozen: bool = False) -> float:
    """Seconds one call takes at least."""
    s = Sizes(case)
    inputs = s.weights + {"forward": s.x, "backward": s.md, "both": s.x + s.md}[mode]
    passes = sum(step.floor_s(peaks) for step in steps(case, way, mode, frozen))
    return max(passes, inputs / peaks.bandwidth)


def in_l2(case: Case, way: str, mode: str, peaks: Peaks, frozen: bool = False) -> tuple[int, int]:
    """How many of a way's passes over memory fit in L2 and so are bound by nothing, of how many."""
    passes = [step for step in steps(case, way, mode, frozen) if not step.flops]
    return sum(step.bytes <= peaks.l2 for step in passes), len(passes)


def model_flops(case: Case, mode: str) -> float:
    """FLOPs of the matrix products the result needs; not those that recomputing repeats."""
    forward = 2.0 * case.rows * case.hidden * (2 * case.channels + case.width)
    return forward * {"forward": 1, "backward": 2, "both": 3}[mode]


def saved_bytes(case: Case, way: str, frozen: bool = False) -> int:
    """Bytes autograd keeps from forward to backward, parameters left out.

    x counts where the way keeps it: nothing else needs the vision tower's last output.
    """
    s = Sizes(case)
    statistics = 2 * s.m * 4  # mean and rstd, float32
    if way in ("cublas", "fused"):  # pooled, a, b
        return s.mc + 2 * s.mf + statistics
    if way == "recompute":  # pooled
        return s.mc + statistics
    pooled_from = 0 if frozen else (s.u if s.resized else s.x)
    gates = {"eager": 4, "compile": 3}[way]  # a, b, s, and in eager silu(a)
    return pooled_from + 2 * s.mc + gates * s.mf + statistics  # 2: pooled, normed
