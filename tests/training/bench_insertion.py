"""What it costs to put image features among the embeddings: by a mask, and at known positions.

    python -m tests.training.bench_insertion --json training/results/insertion.json

Forward and backward of the insertion alone, on the CPU, the ways taking turns; medians of the
trials. Peak memory is what the allocator holds beyond the inputs, from PyTorch's profiler.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from data_pipeline.machine import measured_on
from training.model.hub.modeling_tokenflex import _insert
from training.model.packed import insert_features

Way = Callable[[Tensor, Tensor], Tensor]


def ways(is_image: Tensor) -> dict[str, Way]:
    """Name -> embeddings [1, L, D] and features [K, D] to [1, L, D]."""
    positions = is_image.flatten().nonzero().flatten()
    return {
        "masked_scatter": lambda embeds, features: embeds.masked_scatter(
            is_image[..., None], features
        ),
        "index_copy (training)": lambda embeds, features: insert_features(
            embeds, positions, features
        ),
        "index_select (exported model)": lambda embeds, features: _insert(
            embeds, is_image, features
        ),
    }


def step(way: Way, embeds: Tensor, features: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """The result and both gradients, after the seconds of forward and backward."""
    embeds, features = (t.detach().requires_grad_() for t in (embeds, features))
    start = time.perf_counter()
    out = way(embeds, features)
    middle = time.perf_counter()
    out.backward(grad)
    seconds = torch.tensor([middle - start, time.perf_counter() - middle])
    assert embeds.grad is not None and features.grad is not None
    return seconds, out.detach(), embeds.grad, features.grad


def peak_bytes(run: Callable[[], object]) -> int:
    """Most bytes that tensors held at once while it ran, beyond those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiler.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    held = peak = 0
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.training.bench_insertion")
    parser.add_argument("--length", type=int, default=8192, help="tokens of the pack")
    parser.add_argument("--width", type=int, default=1536, help="of the language model")
    parser.add_argument("--features", type=int, default=6000, help="image tokens among them")
    parser.add_argument("--trials", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    shape = {"tokens": args.length, "width": args.width, "features": args.features}
    is_image = torch.zeros(1, args.length, dtype=torch.bool)
    is_image[0, torch.randperm(args.length, generator=generator)[: args.features]] = True
    result = {"command": "python -m tests.training.bench_insertion", **shape, "ways": []}
    for dtype in (torch.bfloat16, torch.float32):
        embeds, grad = (
            torch.randn(1, args.length, args.width, generator=generator).to(dtype) for _ in range(2)
        )
        features = torch.randn(args.features, args.width, generator=generator).to(dtype)
        runs = {
            name: partial(step, way, embeds, features, grad) for name, way in ways(is_image).items()
        }
        taken: dict[str, list[Tensor]] = {name: [] for name in runs}
        for _ in range(args.trials):
            for name, run in runs.items():
                taken[name].append(run()[0])
        expected = runs["masked_scatter"]()[1:]
        for name, run in runs.items():
            found = run()[1:]
            forward, backward = (
                statistics.median(float(seconds[i]) for seconds in taken[name]) for i in (0, 1)
            )
            result["ways"].append(
                {
                    "way": name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "forward_ms": round(1e3 * forward, 1),
                    "backward_ms": round(1e3 * backward, 1),
                    "peak_mb": round(peak_bytes(run) / 1e6, 1),
                    "same_bits": all(map(torch.equal, found, expected)),
                }
            )
    result |= measured_on(("torch",))
    text = json.dumps(result, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
