"""Run with a CUDA build of torch where there is no GPU: a whole step on fake tensors on "cuda".

    python -m tests.training.cuda_trace RESULTS.json

What a GPU would compute is not computed, but every operation finds its CUDA way, or says that it
has none, and whatever would wait for the GPU raises. Backward is not among it: PyTorch's autograd
asks the driver for the streams of "cuda" tensors (the estimate traces backward on other tensors).
"""

import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._library.fake_impl import FakeImplCtx
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from training.config import TrainSettings, load_config
from training.estimate.packs import PackShape, fake_inputs
from training.model import PackedTokenFlex
from training.model.build import DTYPES, model_config
from training.model.loss import Supervision, find_supervision
from training.parameters import freeze, parameter_groups, recompute_activations
from training.zero3.fake import without_values

PRESET, VOCABULARY, IMAGE = "training/configs/ristretto_3b.yaml", 151_680, 151_667
PACK = PackShape((3000, 1000, 2500, 1500), (16, 12, 8) * 6, 2000)


class CudaOperations(TorchDispatchMode):
    """Counts operations by name, and those that give a result on the GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.on_gpu = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names[func.overloadpacket.__name__] += 1
        self.on_gpu += isinstance(result, Tensor) and result.device.type == "cuda"
        return result


def pretend() -> None:
    """What is asked of the driver, which is not there, and of tensors that have no values."""
    assert torch.version.cuda and not torch.cuda.is_available()
    torch.cuda.get_device_capability = lambda device=None: (9, 0)  # type: ignore[assignment]
    rows = sum(n * n for n in PACK.sides)  # the projector op's
    FakeImplCtx.new_dynamic_size = lambda context, min=0, max=None: rows  # type: ignore[assignment]


def step_inputs(tile_size: int) -> dict[str, Any]:
    """As `model_inputs` gives them, and the samples' ends on the GPU, too.

    The trainer's lie on the host, where they are read: fake tensors have no values there either.
    """
    with unset_fake_temporarily():  # found on the host, as the loader does
        given = fake_inputs(PACK, tile_size, IMAGE, loss_chunks=2)
        labels, weights = given.pop("labels"), given.pop("loss_weights")
        image = (given["input_ids"] == IMAGE).flatten().nonzero().flatten()
        wanted = find_supervision(labels, weights, torch.device("cpu"))
    device = torch.device("cuda", 0)
    moved: dict[str, Any] = {"image_positions": image.to(device)}
    for name in ("input_ids", "position_ids", "pixel_values", "cu_seqlens"):
        moved[name] = given[name].to(device)
    places = (wanted.positions, wanted.targets, wanted.weights)
    moved["supervision"] = Supervision(*(tensor.to(device) for tensor in places))
    return given | moved


def trace(train: TrainSettings) -> dict[str, Any]:
    """Forward, clipping and AdamW of the preset's model; what ran, and for how long."""
    start = time.perf_counter()
    config = load_config(PRESET)
    full = model_config(config.model, VOCABULARY, IMAGE)
    with FakeTensorMode(allow_non_fake_inputs=True), without_values():
        with torch.device("cuda", 0):
            model = PackedTokenFlex._from_config(full, dtype=DTYPES["bf16"]).train()
        model.projector.impl = "triton"
        freeze(model, train.modules)
        if train.recomputed:
            recompute_activations(model, train.recomputed)
        inputs = step_inputs(config.data.tiling.tile_size)
        trained = [p for p in model.parameters() if p.requires_grad]
        with CudaOperations() as operations:
            loss = model(**inputs).loss
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
            torch.optim.AdamW(parameter_groups(model, train), fused=True).step()
        waits = ""
        try:
            model(**inputs | {"image_positions": None})
        except Exception as error:  # a fake tensor has no values to be read
            waits = type(error).__name__
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss": [str(loss.dtype), loss.device.type],
        "waits": waits,
        "on_gpu": operations.on_gpu,
        "names": dict(operations.names),
    }


def main() -> None:
    pretend()
    frozen = {"vision_model": {"train": False}, "language_model": {"train": False}}
    cases = {
        "preset": TrainSettings(steps=1, gradient_checkpointing=True),
        "projector alone": TrainSettings(steps=1, modules=frozen),
    }
    found = {name: trace(train) for name, train in cases.items()}
    Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
