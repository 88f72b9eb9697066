"""What vendors state of their GPUs: peaks that measured figures are held against.

Each number is of the data sheet or white paper named with it, for matrix products of dense bf16
operands summed in fp32 (half of what is printed "with sparsity").
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class GpuDatasheet:
    """A GPU as its vendor states it.

    key: what a user calls it. name: how the name that torch gives starts, the vendor left out.
    bf16_tflops: dense. tb_per_s: bandwidth of the memory. memory_gb: 10^9 bytes. link_gb_per_s: to
    the other GPUs of a node, in one direction.
    """

    key: str
    name: str
    bf16_tflops: float
    tb_per_s: float
    memory_gb: float
    link_gb_per_s: float
    source: str


_A100 = "NVIDIA A100 data sheet (June 2021)"
_H100 = "NVIDIA H100 data sheet (2023)"
_H200 = "NVIDIA H200 data sheet (2024)"
# The first whose name fits counts.
GPUS = (
    GpuDatasheet("a100", "A100-SXM4-80GB", 312, 2.04, 80, 300, _A100),
    GpuDatasheet("a100-40gb", "A100-SXM4-40GB", 312, 1.56, 40, 300, _A100),
    GpuDatasheet("a100-pcie", "A100 80GB PCIe", 312, 1.94, 80, 32, _A100),
    GpuDatasheet("a100-pcie-40gb", "A100-PCIE-40GB", 312, 1.56, 40, 32, _A100),
    GpuDatasheet("h100", "H100 80GB HBM3", 989, 3.35, 80, 450, _H100),
    GpuDatasheet("h100-pcie", "H100 PCIe", 756, 2.0, 80, 64, _H100),
    GpuDatasheet("h100-nvl", "H100 NVL", 835, 3.9, 94, 300, _H100),
    GpuDatasheet("h200-nvl", "H200 NVL", 835, 4.8, 141, 450, _H200),
    GpuDatasheet("h200", "H200", 989, 4.8, 141, 450, _H200),
    GpuDatasheet("b200", "B200", 2250, 8.0, 180, 900, "NVIDIA DGX B200 data sheet (2024)"),
    GpuDatasheet("l40s", "L40S", 362, 0.86, 48, 32, "NVIDIA L40S data sheet (2023)"),
    GpuDatasheet("l4", "L4", 121, 0.3, 24, 32, "NVIDIA L4 data sheet (2023)"),
    GpuDatasheet("mi300x", "MI300X", 1307, 5.3, 192, 448, "AMD Instinct MI300X data sheet (2023)"),
    GpuDatasheet("mi325x", "MI325X", 1307, 6.0, 256, 448, "AMD Instinct MI325X data sheet (2024)"),
)
_VENDORS = ("NVIDIA ", "AMD Instinct ")


def find_gpu(name: str) -> GpuDatasheet | None:
    """The GPU of the name that torch gives; None where it is not known, and of a part (MIG)."""
    for vendor in _VENDORS:
        name = name.removeprefix(vendor)
    if " MIG " in name:
        return None
    return next((gpu for gpu in GPUS if _is_called(name, gpu.name)), None)


def _is_called(name: str, start: str) -> bool:
    """Whether a name starts with these words, so that an L40 is no L4."""
    return f"{name} ".startswith(f"{start} ")
