"""Without a GPU: the floors of an assumed one, in the shape that measurements have."""

from collections.abc import Sequence
from typing import Any

import torch

from kernels.profile.cases import Case
from kernels.profile.results import calculated_case
from kernels.profile.roofline import MODES, Peaks

# Of an H200, FLOP/s of matrix products and bytes/s. Measured: an 8192^3 bf16 product, a copy both
# ways. Not measured: TF32, half of bf16, and float32, nine tenths of the 67 stated.
RATES = {"bf16": 790e12, "fp16": 790e12, "TF32": 395e12, "fp32": 60e12}
BANDWIDTH, L2 = 4.3e12, 60 * 2**20


def products_in(dtype: str) -> str:
    """What matrix products of a dtype are computed in: torch's setting says so of float32."""
    tf32 = dtype == "fp32" and torch.get_float32_matmul_precision() != "highest"
    return "TF32" if tf32 else dtype


def assumed(dtype: str, flops: float | None = None, bandwidth: float | None = None) -> Peaks:
    """The ceilings a calculation assumes, but for what is given."""
    return Peaks(flops or RATES[products_in(dtype)], bandwidth or BANDWIDTH, L2)


def calculate(
    cases: Sequence[Case], frozen: bool, flops: float | None, bandwidth: float | None
) -> list[dict[str, Any]]:
    """The records of cases of which nothing is measured; prints what they assume."""
    rates = {
        f"{assumed(case.dtype, flops).flops / 1e12:g} TFLOP/s in {products_in(case.dtype)}"
        for case in cases
    }
    print(
        "No GPU was found: nothing was timed. The figures below are calculated, for an assumed\n"
        f"{', '.join(sorted(rates))} and {(bandwidth or BANDWIDTH) / 1e12:g} TB/s (set them with "
        "--peak-tflops and --bandwidth).\n--device cpu times this CPU instead.\n"
    )
    return [
        calculated_case(case, assumed(case.dtype, flops, bandwidth), frozen, MODES)
        for case in cases
    ]
