"""Start from another run's weights, which any number of ranks may have saved."""

from pathlib import Path
from typing import Any

from data_pipeline.errors import InputError
from training.distributed import from_main


def load_weights(engine: Any, path: Path) -> None:
    """See `Engine.load_weights`; rank 0 reads the shards.

    engine: DeepSpeed's.
    """
    from deepspeed.runtime.zero import GatheredParameters

    weights: dict[str, Any] = {}  # filled on rank 0 only
    from_main(lambda: weights.update(_read_weights(engine, path)))
    engine.optimizer.checkpoint_event_prologue()
    for prefix, module in engine.module.named_modules():
        if own := dict(module.named_parameters(prefix=prefix, recurse=False)):
            with GatheredParameters(list(own.values()), modifier_rank=0):
                for name in own.keys() & weights.keys():  # on rank 0, all; elsewhere none
                    own[name].data.copy_(weights[name].contiguous())
    engine.optimizer.refresh_fp32_params()
    engine.optimizer.checkpoint_event_epilogue()


def _read_weights(engine: Any, path: Path) -> dict[str, Any]:
    """Every parameter of the engine's model, read one at a time as it is used."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    # DeepSpeed's own load of weights alone leaves out what it partitions: under ZeRO-3, all.
    weights: dict[str, Any] = get_fp32_state_dict_from_zero_checkpoint(
        str(path.parent), tag=path.name, lazy_mode=True
    )
    for name, parameter in engine.module.named_parameters():
        if name not in weights or tuple(weights[name].shape) != tuple(parameter.ds_shape):
            raise InputError(
                f"checkpoint.init_from={path} has no {name} of shape {tuple(parameter.ds_shape)}, "
                "so it is of another model; take one of this model section"
            )
    return weights
