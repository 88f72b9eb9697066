"""Which number format a run computes in where the config leaves it to the machine."""

import torch

from training.config import RunConfig
from training.distributed import Ranks, all_reduce_max


def settle_precision(config: RunConfig, ranks: Ranks) -> RunConfig:
    """The config with `train.precision: auto` replaced, the same on every rank (collective).

    bf16 where every rank's device multiplies it at full speed, fp32 otherwise: a CPU without
    AVX-512 BF16 or AMX takes some fifty times as long for a product in bf16 as in fp32.
    """
    if config.train.precision != "auto":
        return config
    lacking = all_reduce_max([0.0 if has_fast_bf16(ranks.device) else 1.0], ranks.device)[0]
    train = config.train.model_copy(update={"precision": "fp32" if lacking else "bf16"})
    return config.model_copy(update={"train": train})


def has_fast_bf16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 run at the device's full speed."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
