"""Run where liger-kernel is installed, in Triton's interpreter: its kernels in the trainer's model.

TRITON_INTERPRET=1 python -m tests.training.liger_scenarios CORPUS RESULTS.json
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.ranks import RankPool
from tests.training.speed_scenarios import faster_gradients, worst
from tests.training.test_host_waits import Operations, packed_batch
from tests.training.test_model import SAMPLES, gradients, make_batch, make_model
from training.distributed import Ranks
from training.model.pack_inputs import model_inputs
from training.speed.liger_decoder import KNOWN, apply_liger

FP32 = ["train.projector_impl=torch", "model.llm.config.num_hidden_layers=1"]
CALLS: Counter[str] = Counter()


class Scalar(float):
    """A scalar argument of a kernel, which the interpreter leaves a Python number."""

    def to(self, dtype: Any) -> "Scalar":
        return self


def make_interpretable() -> None:
    """Give Liger's kernels what they have on a GPU and the interpreter lacks, and count them."""
    import triton.language as tl
    from liger_kernel.ops import rms_norm, swiglu
    from liger_kernel.ops.rope import LigerRopeFunction
    from liger_kernel.transformers import rope
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt
    interpreter._implicit_cvt = lambda arg: Scalar(arg) if type(arg) is float else convert(arg)
    rms_norm.rsqrt = lambda x: tl.rsqrt(x)  # libdevice's is for GPUs

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            CALLS[name] += 1
            return function(*args, **options)

        return call

    apply = LigerRopeFunction.apply
    rope.dispatch = counted("rope", lambda op, *args, **options: apply(*args, **options))
    for module, name in ((rms_norm, "rms_norm_forward"), (swiglu, "swiglu_forward")):
        setattr(module, name, counted(name, getattr(module, name)))


def error_of(kind: str) -> dict[str, Any]:
    """The worst relative error of loss and gradients, against float64 without Liger."""
    model = make_model(text={"model_type": kind, "max_position_embeddings": 512})
    exact, batch = make_model(text={"model_type": kind}).double(), make_batch(SAMPLES)
    exact.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    results = []
    CALLS.clear()
    for which in (exact, model):
        if which is model:
            apply_liger(model.language_model)
        loss = which(**batch).loss
        loss.backward()
        results.append({"loss": loss.detach(), **gradients(which)})
    expected, found = ({k: v.double().numpy() for k, v in result.items()} for result in results)
    found_calls = dict(CALLS)
    inputs = model_inputs(packed_batch(SAMPLES), torch.device("cpu"))
    with Operations([inputs["cu_seqlens"]]) as operations:
        model(**inputs)
    return {
        "error": worst(expected, found),
        "calls": found_calls,
        "compared": len(expected),
        "waits": operations.waits,
    }


def fused_loss() -> dict[str, Any]:
    """Why Liger's own loss is not taken: what it waits for, and what becomes of no labels."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss, weight = LigerFusedLinearCrossEntropyLoss(reduction="none"), torch.randn(7, 4)
    with Operations([]) as operations:
        loss(weight, torch.randn(3, 4), torch.tensor([1, 2, 3]))
    try:
        loss(weight, torch.randn(0, 4), torch.empty(0, dtype=torch.int64))
        empty = ""
    except ArithmeticError as error:
        empty = type(error).__name__
    return {"waits": operations.waits, "empty": empty}


def engine_gradients(
    ranks: Ranks, corpus: Path, overrides: list[str]
) -> tuple[float, dict[str, np.ndarray]]:
    """As `faster_gradients`, in the interpreter."""
    make_interpretable()
    return faster_gradients(ranks, corpus, [*FP32, *overrides])


def engine_error(corpus: Path) -> float:
    """Of two ranks with every parameter partitioned."""
    pool, results = RankPool(2), []
    try:
        for impl in ("transformers", "liger"):  # a patch stays, so it comes last
            found = pool.run(engine_gradients, corpus, [f"train.decoder_impl={impl}"])
            results.append({"loss": np.asarray(found[0][0]), **found[0][1]})
    finally:
        pool.close()
    return worst(*results)


def main() -> None:
    corpus, out = Path(sys.argv[1]), Path(sys.argv[2])
    found: dict[str, Any] = {"engine": engine_error(corpus)}
    make_interpretable()
    found |= {kind: error_of(kind) for kind in KNOWN}
    found["loss"] = fused_loss()
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
