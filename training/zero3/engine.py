"""DeepSpeed ZeRO-3 around the model: configuration, construction, optimizer."""

from typing import Any

import torch
from transformers.integrations import HfDeepSpeedConfig

from data_pipeline.tokenizer import Tokenizer
from training.config import RunConfig
from training.distributed import Ranks
from training.model.build import build_model
from training.parameters import freeze, parameter_groups
from training.zero3.compatibility import fix_zero3_initialization


def deepspeed_config(config: RunConfig, world_size: int) -> dict[str, Any]:
    """The DeepSpeed configuration of a run: ZeRO-3, precision, offload, accumulation.

    `deepspeed.extra` is merged over it, nested sections key by key.
    """
    settings = config.deepspeed
    zero: dict[str, Any] = {
        "stage": 3,
        "stage3_param_persistence_threshold": settings.param_persistence_threshold,
        "contiguous_gradients": True,
    }
    if settings.offload_optimizer != "none":
        zero["offload_optimizer"] = {"device": settings.offload_optimizer, "pin_memory": True}
    if settings.offload_params != "none":
        zero["offload_param"] = {"device": settings.offload_params, "pin_memory": True}
    base = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": config.data.pack.packs_per_step // world_size,
        "gradient_clipping": config.train.clip_grad_norm,
        "zero_optimization": zero,
        # A client AdamW beside offload is only refused for its speed, which is the user's choice.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if config.train.precision == "bf16":
        base["bf16"] = {"enabled": True}
        # Summed in bf16, many packs would drown the later ones' gradients.
        base["data_types"] = {"grad_accum_dtype": "fp32"}
    return _merge(base, settings.extra)


def build_engine(
    config: RunConfig, tokenizer: Tokenizer, ranks: Ranks, pretrained: bool = True
) -> Any:
    """Build the model partitioned from the start and wrap it in ZeRO-3.

    `pretrained=False` leaves out the pretrained weights, where a checkpoint will replace them.
    """
    import deepspeed

    torch.manual_seed(config.seed)
    ds_config = deepspeed_config(config, ranks.world_size)
    fix_zero3_initialization()
    # Alive while the model is built: transformers then builds and loads it under zero.Init.
    hf_config = HfDeepSpeedConfig(ds_config)
    model = build_model(config, tokenizer, pretrained)
    del hf_config
    model.train()  # from_pretrained leaves evaluation mode, in which nothing is checkpointed
    freeze(model, config.train.modules)
    if config.train.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = _optimizer(model, config, ranks)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    return engine


def _optimizer(model: torch.nn.Module, config: RunConfig, ranks: Ranks) -> torch.optim.Optimizer:
    groups = parameter_groups(model, config.train)
    options: dict[str, Any] = {"betas": config.train.betas, "eps": config.train.eps}
    if config.deepspeed.offload_optimizer == "cpu" and ranks.device.type == "cuda":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
    return torch.optim.AdamW(groups, fused=ranks.device.type == "cuda", **options)


def _merge(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
