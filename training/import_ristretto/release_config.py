"""The config.json of the released Ristretto-3B, both ways."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.models.auto import CONFIG_MAPPING

from data_pipeline.errors import InputError
from training.model.hub import TokenFlexConfig, TokenFlexProcessor
from training.model.hub.vision_siglip_tokenflex import SIGLIP

CODE_FILES = ("modeling_ristretto.py", "projector.py", "conversation.py")
_ARCHITECTURES = {"Qwen2ForCausalLM": "qwen2", "LlamaForCausalLM": "llama"}
_HIDDEN_RATIO = 3
"""Fixed in the release's code."""
# Settings that its code knows and this model has only one value of.
_FIXED = {"select_layer": -1, "pad2square": False, "template": "qwen"}


def config_from_release(released: Mapping[str, Any], source: Path) -> TokenFlexConfig:
    """This project's config of a released one."""
    kind = released.get("model_type")
    if kind != "ristretto" or not {"vision_config", "llm_config"} <= released.keys():
        raise InputError(
            f"{source / 'config.json'} has model_type {kind!r}; expected 'ristretto', with a "
            "vision_config and an llm_config. With --reverse a folder of this project is read"
        )
    for key, value in _FIXED.items():
        if released.get(key, value) != value:
            raise InputError(
                f"{key} is {released[key]!r} in {source / 'config.json'}; only models with "
                f"{value!r} can be converted"
            )
    vision, llm = released["vision_config"], released["llm_config"]
    size = released.get("force_image_size")
    if size not in (None, vision.get("image_size")):
        raise InputError(
            f"force_image_size is {size} but vision_config.image_size is "
            f"{vision.get('image_size')} in {source / 'config.json'}; make them equal"
        )
    if vision.get("model_type") != SIGLIP.model_type:
        raise InputError(
            f"vision_config.model_type is {vision.get('model_type')!r} in "
            f"{source / 'config.json'}; expected {SIGLIP.model_type!r}"
        )
    architecture = (llm.get("architectures") or ["none"])[0]
    if architecture not in _ARCHITECTURES:
        raise InputError(
            f"llm_config.architectures names {architecture!r}; expected one of "
            f"{', '.join(_ARCHITECTURES)}"
        )
    try:
        return TokenFlexConfig(
            vision_config=_known(vision, SIGLIP.model_type),
            text_config=_known(llm, _ARCHITECTURES[architecture]),
            pool="resize",
            projector_hidden_ratio=_HIDDEN_RATIO,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{source / 'config.json'} does not describe a model: {error}") from error


def _known(fields: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """The fields that decide the architecture: old configs carry those of generation along."""
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"model_type {model_type!r} is not known to transformers")
    known = CONFIG_MAPPING[model_type]().to_dict().keys() | {"rope_theta", "rope_scaling"}
    known -= {"architectures", "dtype", "_name_or_path", "transformers_version", "use_cache"}
    return {**{k: v for k, v in fields.items() if k in known}, "model_type": model_type}


def check_expressible(config: TokenFlexConfig, source: Path) -> None:
    """InputError for a model that the release's code would compute differently, or not at all."""
    kind = config.text_config.model_type
    found = {
        "projector_method": (config.projector_method, "pool"),
        "pool": (config.pool, "resize"),
        "projector_hidden_ratio": (config.projector_hidden_ratio, _HIDDEN_RATIO),
        "image_mean": (config.image_mean, [0.5] * 3),
        "image_std": (config.image_std, [0.5] * 3),
        "vision_config.model_type": (config.vision_config.model_type, SIGLIP.model_type),
        "text_config.model_type": (kind, kind if kind in _ARCHITECTURES.values() else "qwen2"),
    }
    different = [
        f"{key} is {value!r}, not {expected!r}"
        for key, (value, expected) in found.items()
        if value != expected
    ]
    if different:
        raise InputError(
            f"{source} cannot be written in the released layout, whose code is fixed there: "
            f"{'; '.join(different)}"
        )


def config_to_release(
    config: TokenFlexConfig, processor: TokenFlexProcessor, dtype: torch.dtype, has_head: bool
) -> dict[str, Any]:
    text = config.text_config.to_dict()
    architectures = {kind: name for name, kind in _ARCHITECTURES.items()}
    # Transformers before version 5, which the release's code is for, knows rope by two keys.
    rope = dict(text.pop("rope_parameters", None) or {})
    text["rope_theta"] = rope.pop("rope_theta", 10000.0)
    text["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    name = str(dtype).removeprefix("torch.")
    text |= {"architectures": [architectures[text["model_type"]]], "torch_dtype": name}
    vision = {**config.vision_config.to_dict(), "vision_use_head": has_head}
    for part in (text, vision):
        for key in ("dtype", "layer_types", "_name_or_path", "transformers_version"):
            part.pop(key, None)
    images = processor.image_processor
    code = Path(CODE_FILES[0]).stem
    return {
        "architectures": ["RistrettoModel"],
        "auto_map": {
            "AutoConfig": f"{code}.RistrettoConfig",
            "AutoModel": f"{code}.RistrettoModel",
            "AutoModelForCausalLM": f"{code}.RistrettoModel",
        },
        "model_type": "ristretto",
        "torch_dtype": name,
        "dynamic_image_size": images.max_tiles > 1,
        "force_image_size": config.tile_size,
        "min_dynamic_patch": images.min_tiles,
        "max_dynamic_patch": images.max_tiles,
        "use_thumbnail": images.thumbnail,
        "num_image_token": processor.num_image_tokens,
        **_FIXED,
        "llm_config": text,
        "vision_config": vision,
    }
