"""A run's adapters as a folder that PEFT loads beside the base, which is the folder around it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.errors import InputError
from training.adapters import AdapterSettings, StageAdapters, lora_config, piece_of
from training.export.safetensors_files import write_file
from training.export.weights import Weight
from training.model.hub.language_model_tokenflex import EARLIER_NAMES, renamed

FOLDER = "adapter"
APART = ("vision_model", "language_model")
"""Parts whose adapters are PEFT's; those of the projector's matrices are merged into the base."""
_WEIGHTS = "adapter_model.safetensors"


def check_adapters(adapters: StageAdapters, run: Path) -> None:
    """InputError where these adapters are not one adapter of PEFT."""
    found = {part: adapters.given[part] for part in APART if part in adapters.given}
    if not found:
        raise InputError(
            f"{run} has no adapters of {' or '.join(APART)}; leave --adapter out, and its weights "
            "are exported as they are, or merged"
        )
    for key in ("use_dora", "use_rslora"):
        if len({getattr(settings, key) for settings in found.values()}) > 1:
            raise InputError(
                f"{run} has adapters with and without {key}, which cannot be one adapter of PEFT; "
                "leave --adapter out, and they are merged"
            )


def split_pieces(weights: Sequence[Weight]) -> tuple[list[Weight], list[Weight]]:
    """Weights of the base, and those of adapters."""
    pieces = [weight for weight in weights if piece_of(weight.name)]
    return [weight for weight in weights if not piece_of(weight.name)], pieces


def write_adapter(
    folder: Path, pieces: Sequence[Weight], adapters: StageAdapters, base: str
) -> None:
    """Write adapter_config.json and the weights, by their names beside an exported model.

    base: the folder of the model that they lie beside.
    """
    folder.mkdir()
    settings = [adapters.given[part] for part in APART if part in adapters.given]
    config = lora_config(settings[-1], sorted({_layer(weight.name) for weight in pieces}))
    config.base_model_name_or_path = base
    config.inference_mode = True
    _set_patterns(config, adapters)
    config.save_pretrained(folder)
    stored = [weight.renamed(_stored_name(weight.name)) for weight in pieces]
    write_file(folder / _WEIGHTS, stored)


def _set_patterns(config: Any, adapters: StageAdapters) -> None:
    """Let each part have its own rank and alpha."""
    for part in APART:
        settings: AdapterSettings | None = adapters.given.get(part)
        if settings:
            config.rank_pattern[rf"model\.{part}\..*"] = settings.r
            config.alpha_pattern[rf"model\.{part}\..*"] = settings.alpha or settings.r


def _hub_name(name: str) -> str:
    return renamed(name, EARLIER_NAMES)


def _layer(name: str) -> str:
    """The layer in the exported model that an adapter's parameter lies beside."""
    piece = piece_of(_hub_name(name))
    assert piece is not None, name
    return piece[0].removesuffix(".weight")


def _stored_name(name: str) -> str:
    """As PEFT stores it: without the adapter's name, and a vector without `weight`."""
    stored = f"base_model.model.{_hub_name(name)}".replace(".default.weight", ".weight")
    if stored.endswith("lora_magnitude_vector.weight"):
        stored = stored.removesuffix(".weight")
    return stored
