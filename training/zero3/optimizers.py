"""The optimizer of a run, by its name."""

from typing import Any

import torch

from data_pipeline.errors import InputError
from training.config import RunConfig
from training.distributed import Ranks
from training.parameters import Shape, parameter_groups
from training.zero3.muon import ShardedMuon


def make_optimizer(
    model: torch.nn.Module, config: RunConfig, ranks: Ranks, shape: Shape
) -> torch.optim.Optimizer:
    """What `train.optimizer` names, over the groups of what trains.

    Raises:
        InputError: where it cannot work with the other settings of the engine.
    """
    train, on_gpu = config.train, ranks.device.type == "cuda"
    name = train.optimizer.name
    groups = parameter_groups(model, train, shape)
    options: dict[str, Any] = {"betas": train.betas, "eps": train.eps}
    check_optimizer(config)
    if name == "muon":
        fused = on_gpu and not config.optimizer_on_host
        return ShardedMuon(groups, ranks.device, fused=fused, **options)
    if name == "fused_adamw":
        return torch.optim.AdamW(groups, fused=True, **options)
    if config.optimizer_on_host and on_gpu:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
    return torch.optim.AdamW(groups, fused=on_gpu, **options)


def check_optimizer(config: RunConfig) -> None:
    """InputError where the optimizer would be offloaded in part and is not AdamW.

    DeepSpeed trains what stays on the GPU with an AdamW of its own, and does not say so.
    """
    zero = config.deepspeed.extra.get("zero_optimization") or {}
    ratio, name = (zero.get("offload_optimizer") or {}).get("ratio", 1), config.train.optimizer.name
    if ratio != 1 and name == "muon":
        raise InputError(
            f"train.optimizer.name={name} cannot be offloaded in part (offload_optimizer.ratio="
            f"{ratio} in deepspeed.extra): offload all of it (1), or take adamw"
        )
