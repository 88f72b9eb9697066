"""`deepspeed.extra`: which of DeepSpeed's own options may be set, and who owns the others.

DeepSpeed ignores keys that it does not know, and takes from an option what the trainer has set
already. What may be set here changes speed and memory, not what is trained.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from pydantic import StrictBool, ValidationError, create_model

from data_pipeline.config_file import Settings, describe, nearest
from data_pipeline.errors import InputError
from training.config import DeepSpeedSettings, RunConfig

_BATCH = "data.pack.packs_per_step and the number of ranks decide that"
_OPTIMIZER = "set train.modules.*.lr, train.betas, train.eps, train.weight_decay instead"
_PRECISION = "set train.precision instead"
_SCALE = "the trainer scales gradients itself, by one denominator for each step"
_LOG = "metrics.jsonl and TensorBoard are in output_dir; train.log_every says how often to print"
_CHECKPOINT = "set the checkpoint section instead"
_DATA = "set the data section instead"
_OFFLOAD = "set deepspeed.offload_optimizer or deepspeed.offload_params instead"
_UNUSED = "this trainer has no use for it"
_OTHER_STAGE = "ZeRO-3 does not use it"

OWNED = {
    "train_batch_size": _BATCH,
    "train_micro_batch_size_per_gpu": _BATCH,
    "gradient_accumulation_steps": _BATCH,
    "managed_gradient_accumulation": _BATCH,
    "optimizer": _OPTIMIZER,
    "zero_allow_untested_optimizer": _OPTIMIZER,
    "zero_force_ds_cpu_optimizer": _OFFLOAD,
    "scheduler": "set train.schedule, train.warmup_fraction and train.min_lr_fraction instead",
    "fp16": _PRECISION,
    "bf16": _PRECISION,
    "bfloat16": _PRECISION,
    "torch_autocast": _PRECISION,
    "data_types": _PRECISION,
    "gradient_clipping": "set train.clip_grad_norm instead",
    "prescale_gradients": _SCALE,
    "gradient_predivide_factor": _SCALE,
    "gradient_allreduce_op": _SCALE,
    "activation_checkpointing": "set train.gradient_checkpointing instead",
    "steps_per_print": _LOG,
    "tensorboard": _LOG,
    "wandb": _LOG,
    "csv_monitor": _LOG,
    "comet": _LOG,
    "checkpoint": _CHECKPOINT,
    "datastates_ckpt": _CHECKPOINT,
    "data_efficiency": _DATA,
    "dataloader_drop_last": _DATA,
    **dict.fromkeys(
        (
            "aio",
            "autotuning",
            "compile",
            "disable_allgather",
            "disable_python_gc",
            "expert_parallel",
            "hybrid_engine",
            "log_level",
            "pipeline",
            "seq_parallel_communication_data_type",
            "sequence_parallel_size",
            "tensor_parallel",
            "use_data_before_expert_parallelism",
            "vocabulary_size",
            "weight_quantization",
        ),
        _UNUSED,
    ),
}
"""DeepSpeed's options that are not set here, and what to do instead."""

OWNED_ZERO = {
    "stage": "this trainer is ZeRO stage 3",
    "param_persistence_threshold": "set deepspeed.param_persistence_threshold instead",
    "stage3_param_persistence_threshold": "set deepspeed.param_persistence_threshold instead",
    "cpu_offload": _OFFLOAD,
    "cpu_offload_param": _OFFLOAD,
    "cpu_offload_use_pin_memory": _OFFLOAD,
    "elastic_checkpoint": _CHECKPOINT,
    "load_from_fp32_weights": _CHECKPOINT,
    "pipeline_loading_checkpoint": _CHECKPOINT,
    "gather_16bit_weights_on_model_save": "training.export writes whole weights",
    "stage3_gather_16bit_weights_on_model_save": "training.export writes whole weights",
    "stage3_gather_fp16_weights_on_model_save": "training.export writes whole weights",
    "compute_grad_norm": "the trainer needs the norm of every step",
    "zenflow": _OPTIMIZER,
    "save_muon_momentum_buffer_in_memory": _OPTIMIZER,
    **dict.fromkeys(
        (
            "allgather_bucket_size",
            "allgather_partitions",
            "ignore_unused_parameters",
            "legacy_stage1",
            "round_robin_gradients",
            "use_multi_rank_bucket_allreduce",
        ),
        _OTHER_STAGE,
    ),
}
"""The same of its section zero_optimization."""

_OFFLOADED = {
    "offload_optimizer": ("offload_optimizer", {"pin_memory", "ratio"}),
    "offload_param": ("offload_params", {"pin_memory"}),
}
"""What may be set of offloading, where the setting named turns it on."""


class _FlopsProfiler(Settings):
    enabled: StrictBool = False
    recompute_fwd_factor: float = 0.0
    profile_step: int = 1
    module_depth: int = -1
    top_modules: int = 1
    detailed: StrictBool = True
    output_file: str | None = None


def check_extra(config: RunConfig) -> None:
    """Check `deepspeed.extra`.

    Raises:
        InputError: naming every option that the trainer owns or DeepSpeed does not know, and every
            wrong value.
    """
    settings, extra = config.deepspeed, config.deepspeed.extra
    if not extra:
        return
    # One for a key, whose owner comes before its value.
    problems = [*dict([*_automatic(extra), *_refused(settings)]).items()]
    if not problems:
        try:
            _model().model_validate(_at_stage_3(extra))
        except ValidationError as error:
            problems = describe(_model(), error)
        except (AssertionError, ValueError, TypeError) as error:
            problems = [("zero_optimization", str(error))]
    if problems:
        lines = "\n".join(f"  deepspeed.extra.{key}: {problem}" for key, problem in problems)
        raise InputError(f"deepspeed.extra cannot be used as it is:\n{lines}")


@contextmanager
def refusals(extra: dict[str, Any]) -> Iterator[None]:
    """What DeepSpeed refuses while it starts, as InputError where options are set that it may mean:

    an option may need a GPU, or another number of ranks.
    """
    try:
        yield
    except InputError:
        raise
    except (AssertionError, ValueError, TypeError, NotImplementedError) as error:
        if not extra:
            raise
        raise InputError(
            f"DeepSpeed does not start with deepspeed.extra={extra}: {error or type(error)}; leave "
            "out what these ranks and devices cannot do"
        ) from error


def _model() -> type[Settings]:
    """The options that may be set, with DeepSpeed's own models of its sections."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    timers = create_model(
        "_Timers", __base__=Settings, throughput=(DeepSpeedThroughputTimerConfig, ...)
    )
    sections = {
        "zero_optimization": DeepSpeedZeroConfig,
        "comms_logger": CommsLoggerConfig,
        "flops_profiler": _FlopsProfiler,
        "timers": timers,
        "communication_data_type": Literal["fp32", "bf16", "fp16"],
        **dict.fromkeys(("wall_clock_breakdown", "memory_breakdown", "dump_state"), StrictBool),
    }
    fields: dict[str, Any] = {name: (kind | None, None) for name, kind in sections.items()}
    return create_model("_Extra", __base__=Settings, **fields)


def _at_stage_3(extra: dict[str, Any]) -> dict[str, Any]:
    zero = extra.get("zero_optimization")
    return extra | {"zero_optimization": {"stage": 3, **zero}} if isinstance(zero, dict) else extra


def _automatic(extra: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Values that the Trainer of Hugging Face would fill in, and nobody does here."""
    for key, value in extra.items():
        if isinstance(value, Mapping):
            yield from _automatic(value, f"{prefix}{key}.")
        elif value == "auto":
            yield (
                f"{prefix}{key}",
                '"auto" is for the Trainer of Hugging Face, which fills it in; leave the key out',
            )


def _refused(settings: DeepSpeedSettings) -> Iterator[tuple[str, str]]:
    """Keys that the trainer owns, and those that nobody knows."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    extra = settings.extra
    yield from _not_ours(extra, set(_model().model_fields), OWNED)
    zero = extra.get("zero_optimization")
    if not isinstance(zero, Mapping):
        return
    own = DeepSpeedZeroConfig.model_fields
    fields = own | {field.alias: field for field in own.values() if field.alias}
    yield from _not_ours(zero, fields.keys() - OWNED_ZERO.keys(), OWNED_ZERO, "zero_optimization.")
    for key, value in zero.items():
        if isinstance(value, bool) and key in fields and fields[key].annotation is int:
            yield f"zero_optimization.{key}", f"expected a number, not a switch (found {value})"
    for section, (setting, allowed) in _OFFLOADED.items():
        options, prefix = zero.get(section), f"zero_optimization.{section}"
        if options is None:
            continue
        if getattr(settings, setting) == "none":
            yield prefix, f"set deepspeed.{setting}=cpu: without it, this changes nothing"
        elif isinstance(options, Mapping):
            owned = dict.fromkeys(options.keys() & {"device"}, f"set deepspeed.{setting} instead")
            yield from _not_ours(options, allowed, owned, f"{prefix}.")


def _not_ours(
    options: Mapping[str, Any], allowed: set[str], owned: Mapping[str, str], prefix: str = ""
) -> Iterator[tuple[str, str]]:
    for key in options:
        if key in owned:
            yield f"{prefix}{key}", f"is the trainer's: {owned[key]}"
        elif key not in allowed:
            hint = nearest(key, sorted(allowed | owned.keys()))
            if "did you mean" not in hint:
                hint = nearest(key, sorted(allowed))
            yield f"{prefix}{key}", f"unknown key{hint}"
