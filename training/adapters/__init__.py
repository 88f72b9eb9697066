"""LoRA adapters, through PEFT: their settings, their layers, and matrices with them merged in."""

from training.adapters.adapted_model import adapted_layers, add_adapters, lora_config
from training.adapters.adapter_names import piece_of, plain_name
from training.adapters.adapter_settings import (
    AdapterSettings,
    ProjectorAdapterSettings,
    StageAdapters,
)
from training.adapters.merged_weights import merged

__all__ = [
    "AdapterSettings",
    "ProjectorAdapterSettings",
    "StageAdapters",
    "adapted_layers",
    "add_adapters",
    "lora_config",
    "merged",
    "piece_of",
    "plain_name",
]
