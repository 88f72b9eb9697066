"""Other projects' kernels on the same rows, where they are installed; none is needed.

Both that join w1 and w2 do so in every call, a copy of 2 F C elements that a model keeping them
joined would not make.
"""

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.passes import Weights
from kernels.profile.baselines import EPS, Call, Provider, eager_batched, norm_and_mlp
from kernels.profile.cases import Case


def liger(case: Case, device: torch.device) -> Call:
    """`eager_batched` with Liger-Kernel's SwiGLU."""
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    def mlp(rows: Tensor, w: Weights) -> Tensor:
        return norm_and_mlp(rows, w, gate=lambda a, b: LigerSiLUMulFunction.apply(a, b))

    return eager_batched(case, device, mlp)


def quack(case: Case, device: torch.device) -> Call:
    """`eager_batched` with quack's gated GEMMs; they take the rows of w1 and w2 in turn."""
    from quack.linear import gated_linear_func, linear_gated_func

    def mlp(rows: Tensor, w: Weights) -> Tensor:
        normed = F.layer_norm(rows, (rows.shape[-1],), w.norm_weight, w.norm_bias, EPS)
        joined, bias = (torch.stack(pair, 1).flatten(0, 1) for pair in ((w.w1, w.w2), (w.b1, w.b2)))
        gates, product = linear_gated_func(normed, joined, "swiglu", bias=bias, tuned=False)
        return gated_linear_func(gates, w.w3, product, "swiglu", bias=w.b3, tuned=False)

    return eager_batched(case, device, mlp)


def transformer_engine(case: Case, device: torch.device) -> Call:
    """`eager_batched` with TransformerEngine's LayerNormMLP, given the same weights."""
    import transformer_engine.pytorch as te

    module = te.LayerNormMLP(
        *(case.channels, case.hidden),
        **{"eps": EPS, "normalization": "LayerNorm", "activation": "swiglu", "device": device},
        params_dtype=case.torch_dtype,
    )

    def mlp(rows: Tensor, w: Weights) -> Tensor:
        given = {
            **{"layer_norm_weight": w.norm_weight, "layer_norm_bias": w.norm_bias},
            **{"fc1_weight": torch.cat((w.w1, w.w2)), "fc1_bias": torch.cat((w.b1, w.b2))},
            **{"fc2_weight": w.w3, "fc2_bias": w.b3},
        }
        return torch.func.functional_call(module, given, (rows,))

    return eager_batched(case, device, mlp)


def _unfit(
    module: str, package: str, oldest: tuple[int, int] = (0, 0), square: bool = False
) -> Callable[[Case, torch.device], str | None]:
    """What says why a library cannot run: missing, no GPU or one too old, D other than C."""

    def unfit(case: Case, device: torch.device) -> str | None:
        if importlib.util.find_spec(module) is None:
            return f"{package} is not installed; to compare with it: pip install {package}"
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < oldest:
            return "needs a GPU" + (" of sm_{}{} or newer".format(*oldest) if any(oldest) else "")
        if square and case.width != case.channels:
            return f"gives as many channels as it takes: D={case.channels} would compare"
        return None

    return unfit


PROVIDERS = (
    Provider(
        *("liger", "eager_batched with Liger's SwiGLU", "compile", liger),
        unfit=_unfit("liger_kernel", "liger-kernel"),
    ),
    Provider(
        *("quack", "eager_batched with quack's gated GEMMs", "fused", quack),
        unfit=_unfit("quack", "quack-kernels", oldest=(9, 0)),
        build_s=20,
    ),
    Provider(
        *("te", "eager_batched with TransformerEngine's LayerNormMLP", "compile"),
        transformer_engine,
        unfit=_unfit("transformer_engine", "transformer-engine[pytorch]", square=True),
    ),
)
