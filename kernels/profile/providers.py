"""The ways to run the projector that are compared: name -> a function of (x, weights)."""

from collections.abc import Callable

import torch

from kernels import token_adaptive_projector
from kernels.profile import libraries
from kernels.profile.baselines import (
    EPS,
    Call,
    Provider,
    eager_batched,
    eager_grouped,
    eager_loop,
)
from kernels.profile.cases import Case
from kernels.profile.cuda_graph import replayed

COMPILE_BACKEND = "inductor"


def compiled(mode: str = "default") -> Callable[[Case, torch.device], Call]:
    """torch.compile of `eager_batched`, whole, for exactly these sides and shapes."""

    def build(case: Case, device: torch.device) -> Call:
        torch._dynamo.reset()  # the limit on recompilations counts those of earlier cases
        call = eager_batched(case, device)
        return torch.compile(
            call, fullgraph=True, dynamic=False, backend=COMPILE_BACKEND, mode=mode
        )

    return build


def ours(backward: str, gemm: str = "auto") -> Callable[[Case, torch.device], Call]:
    """The op of this repository."""

    def build(case: Case, device: torch.device) -> Call:
        sides = torch.tensor(case.sides)
        return lambda x, w: token_adaptive_projector(
            x, sides, *w, grid=case.grid, pool=case.pool, backward=backward, gemm=gemm, eps=EPS
        )

    return build


def _needs_gpu(case: Case, device: torch.device) -> str | None:
    return None if device.type == "cuda" else "needs a GPU"


def _fused_unfit(case: Case, device: torch.device) -> str | None:
    unfit = "the fused GEMMs take bf16 and fp16" if case.dtype == "fp32" else None
    return _needs_gpu(case, device) or unfit


def _batched_unfit(case: Case, device: torch.device) -> str | None:
    return "the same as eager_grouped where all tiles have one n" if case.uniform else None


_TUNED = "max-autotune-no-cudagraphs"  # graphs would copy all inputs, weights too, in every call
PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("eager_loop", "torch ops, tile by tile", "eager", eager_loop),
        Provider("eager_grouped", "torch ops, once per n", "eager", eager_grouped),
        Provider(
            *("eager_batched", "torch ops, pooling per n and one MLP", "eager", eager_batched),
            unfit=_batched_unfit,
        ),
        Provider("compile", "torch.compile of eager_batched", "compile", compiled(), build_s=15),
        Provider(
            *("compile_max", "the same with max-autotune", "compile", compiled(_TUNED), _needs_gpu),
            build_s=90,
            default=False,
        ),
        *libraries.PROVIDERS,
        Provider("save", "this op, backward=save", "cublas", ours("save")),
        Provider("recompute", "this op, backward=recompute", "recompute", ours("recompute")),
        Provider("fused", "this op, gemm=fused", "fused", ours("save", "fused"), _fused_unfit),
        Provider(
            *("graph", "this op's steps replayed as a CUDA graph", "cublas", replayed, _needs_gpu),
        ),
    )
}
