"""DeepSpeed's configuration, from the settings of a run."""

from typing import Any

from training.config import RunConfig
from training.zero3.model_sizes import prefetch_of_model

_PERSISTENT = 100_000  # elements, as DeepSpeed's own


def deepspeed_config(config: RunConfig, world_size: int) -> dict[str, Any]:
    """The DeepSpeed configuration of a run: ZeRO-3, precision, offload, accumulation.

    `deepspeed.extra` is merged over it, nested sections key by key.
    """
    settings = config.deepspeed
    zero: dict[str, Any] = {
        "stage": 3,
        "stage3_param_persistence_threshold": _PERSISTENT,
        "contiguous_gradients": True,
    }
    if settings.prefetch == "model":
        zero |= prefetch_of_model(config)
    if settings.param_persistence_threshold is not None:
        zero["stage3_param_persistence_threshold"] = settings.param_persistence_threshold
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
    if config.train.optimizer.name == "muon":  # the trainer's own, of which DeepSpeed knows nothing
        base["zero_allow_untested_optimizer"] = True
    if config.train.precision == "bf16":
        base["bf16"] = {"enabled": True}
        # Summed in bf16, many packs would drown the later ones' gradients.
        base["data_types"] = {"grad_accum_dtype": "fp32"}
    return _merge(base, settings.extra)


def _merge(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        if value is None:  # a section that is empty
            continue
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
