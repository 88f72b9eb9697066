"""The peak that MFU and HFU are a part of."""

import torch

from kernels.gpu_datasheets import find_gpu


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Dense bf16 FLOP/s that the vendor states for a GPU.

    None for a CPU, for a GPU that the table does not know, and where training is not in bf16: no
    figure rather than a guess.
    """
    if device.type != "cuda" or precision != "bf16":
        return None
    gpu = find_gpu(torch.cuda.get_device_name(device))
    return gpu.bf16_tflops * 1e12 if gpu else None
