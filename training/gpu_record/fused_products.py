"""Whether the fused matrix products stay: the whole op with each, forward and backward.

    TOKENFLEX_TILES=tiles.json python -m training.gpu_record.fused_products --out FILE.json

cublas: what ships. fused: both fused products, everywhere. auto: each where the table of the tuner
says that it won. They stay if fused or auto is faster than cublas, by more than two measurements of
cublas differ and by 2 %, in one of the cases; otherwise they are to be removed. Each case is
written when it ends, and not measured again.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from data_pipeline.cli import command_parser, run_cli
from data_pipeline.files import write_atomically
from data_pipeline.machine import measured_on
from data_pipeline.paths import path_argument
from kernels import POOL_MODES, token_adaptive_projector
from kernels.profile.cases import Case, parse_shape
from kernels.profile.random_inputs import Inputs, backward, rotating_inputs
from kernels.profile.timing import sample

LEAST_GAIN = 0.02
WAYS = ("cublas", "fused", "auto", "cublas again")


def default_cases() -> list[Case]:
    """Mixed sides from 2,900 to 47,000 tokens, in both pooling modes."""
    mixed = ((8, 12, 16), (0.2, 0.3, 0.5))
    return [Case(*mixed, tiles=t, pool=pool) for t in (16, 64, 256) for pool in POOL_MODES]


def measure_case(case: Case, device: torch.device, samples: int) -> dict[str, Any]:
    """Median milliseconds of forward and backward in each of `WAYS`, and what follows."""
    sets, sides = rotating_inputs(case, device), torch.tensor(case.sides)
    found: dict[str, float] = {}
    for way in WAYS:

        def both(inputs: Inputs, gemm: str = way.split()[0]) -> None:
            options: dict[str, Any] = {"grid": case.grid, "pool": case.pool, "gemm": gemm}
            out = token_adaptive_projector(
                inputs.x, sides, *inputs.weights, impl="triton", **options
            )
            backward(inputs, out)

        def pick(i: int) -> Inputs:
            return sets[i % len(sets)]

        sample(pick, both, device, min(5, samples))  # compiles, allocates
        found[way] = statistics.median(sample(pick, both, device, samples))
    return {"case": case.name, "tokens": case.rows, "ms": found, **compared(found)}


def compared(ms: dict[str, float]) -> dict[str, Any]:
    """Speed over the faster measurement of cublas, its noise, and which ways are faster."""
    both = (ms["cublas"], ms["cublas again"])
    noise = max(both) / min(both) - 1
    over = {way: min(both) / ms[way] for way in ("fused", "auto")}
    faster = [way for way, ratio in over.items() if ratio > 1 + max(noise, LEAST_GAIN)]
    return {"over_cublas": over, "noise": noise, "faster": faster}


def main() -> None:
    parser = command_parser("training.gpu_record.fused_products", __doc__)
    parser.add_argument("--out", type=path_argument, required=True, help="JSON file, or to go on")
    parser.add_argument("--shape", action="append", type=parse_shape, help="as kernels.profile's")
    parser.add_argument("--samples", type=int, default=60, help="timed calls of each way (60)")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    content = _read(args.out) or {"cases": []}
    content |= {"command": " ".join(["python", "-m", parser.prog.split()[-1], *sys.argv[1:]])}
    content |= measured_on(("torch", "triton"))
    done = {record["case"] for record in content["cases"]}
    for case in args.shape or default_cases():
        if case.name in done:
            continue
        record = measure_case(case, device, args.samples)
        content["cases"].append(record)
        content["they_stay"] = any(record["faster"] for record in content["cases"])
        write_atomically(args.out, json.dumps(content, indent=1).encode() + b"\n")
        ratios = ", ".join(f"{way} {ratio:.3f}x" for way, ratio in record["over_cublas"].items())
        print(f"{case.name}: {ratios} cuBLAS, noise {record['noise']:.1%}", flush=True)
    print(f"the fused products {'stay' if content['they_stay'] else 'are to be removed'}")


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


if __name__ == "__main__":
    run_cli(main)
