"""The layout of the released Ristretto-3B (huggingface.co/LiAutoAD/Ristretto-3B), both ways.

Its config.json has `vision_config` (SigLIP), `llm_config` (Qwen2 or Llama, with `architectures`),
and tiling and token count beside them; its weights are `vision_model.vision_model.*`,
`projector.mlp.{layernorm,f1,f2,g}.*` and `language_model.*`. The vision tower's pooling head is
stored though the model never runs it; `VISION_HEAD` keeps it for the way back.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from data_pipeline.errors import InputError
from data_pipeline.files import write_atomically
from data_pipeline.processor.prompt_tokenflex import SPECIAL_TOKENS
from data_pipeline.tiling import TilingSettings
from data_pipeline.tokenizer import HuggingFaceTokenizer
from training.export import ModelFolder, Weight, folder_weights, new_folder
from training.export.card import card
from training.export.hub_tokenizer import to_hub_tokenizer
from training.export.safetensors_files import write_file, write_weights
from training.export.weights import check_weights
from training.generate.template import template_settings
from training.import_ristretto.release_config import (
    check_expressible,
    config_from_release,
    config_to_release,
)
from training.model.hub import TokenFlexConfig, TokenFlexProcessor
from training.model.hub.language_model_tokenflex import EARLIER_NAMES, renamed, trainer_names
from training.model.packed_projector import RELEASED_NAMES

VISION_HEAD = "vision_head.safetensors"
SYSTEM = "You are a helpful assistant."
"""What the release's template `qwen` says first; the rest of that template is ChatML. Its `chat()`
puts `<image>` and a line end before a question."""

_PROJECTOR = "projector.mlp."
_VISION = "vision_model.vision_model."
_HEAD = _VISION + "head."


def from_release(source: Path, out: Path, max_bytes: int) -> list[str]:
    """Convert a folder in the released layout; returns what a user should know.

    Weights keep their number format.

    Raises:
        InputError: if the config is of another kind, a marker of the prompt is not in the
            tokenizer, tensors are missing, unknown or of another shape, or `out` is in use.
    """
    released = _read_json(source / "config.json")
    config = config_from_release(released, source)
    weights: list[Weight] = []
    head: list[Weight] = []
    for weight in _rename(folder_weights(source), _nested):
        (head if weight.name.startswith(_HEAD) else weights).append(weight)
    tokenizer, length = _tokenizer(source)
    config.image_token_id = tokenizer.special_id("<IMG_CONTEXT>")
    context = getattr(config.text_config, "max_position_embeddings", length)
    many = released.get("dynamic_image_size", False)
    tiling = TilingSettings(
        tile_size=config.tile_size,
        min_tiles=released.get("min_dynamic_patch", 1) if many else 1,
        max_tiles=released.get("max_dynamic_patch", 6) if many else 1,
        thumbnail=released.get("use_thumbnail", False),
    )
    form = ModelFolder(
        config,
        _common_dtype(weights),
        to_hub_tokenizer(tokenizer, min(length, context)),
        tiling,
        released.get("num_image_token", 256),
        SYSTEM,
        str(source),
        image_newline=True,
    )
    to_released = _to_released(config)
    expected = {to_released(name): shape for name, shape in form.shapes().items()}
    check_weights({weight.name: weight.shape for weight in weights}, expected, str(source))
    with new_folder(out) as temporary:
        form.write(temporary, _rename(weights, _from_released), _card(form), max_bytes)
        if head:
            write_file(temporary / VISION_HEAD, head)
    return []


def to_release(source: Path, out: Path, max_bytes: int) -> list[str]:
    """Convert an exported folder to the released layout; returns what a user should know.

    Raises:
        InputError: if the model is one that the release's code cannot be set to, its weights do
            not fit its config, or `out` is in use.
    """
    if _read_json(source / "config.json").get("model_type") != TokenFlexConfig.model_type:
        raise InputError(
            f"{source} is no model folder of this project; without --reverse a released one is read"
        )
    config = TokenFlexConfig.from_pretrained(source)
    check_expressible(config, source)
    processor = TokenFlexProcessor.from_pretrained(source, trust_remote_code=False)
    assert isinstance(processor, TokenFlexProcessor)
    weights = _rename(folder_weights(source), lambda name: renamed(name, EARLIER_NAMES))
    dtype = _common_dtype(weights)
    form = ModelFolder(config, dtype, processor.tokenizer, TilingSettings(), 1, SYSTEM, str(source))
    check_weights({weight.name: weight.shape for weight in weights}, form.shapes(), str(source))
    weights = _rename(weights, _to_released(config))
    notes = []
    template = template_settings(processor)
    if template.system != SYSTEM:
        notes.append(
            f"the release's code begins every prompt with {SYSTEM!r}, and this model was trained "
            "with another beginning"
        )
    if not template.image_newline:
        notes.append(
            "the release's code puts a line end between an image and the question, and this "
            "model's prompts have none"
        )
    has_head = (source / VISION_HEAD).is_file()
    if has_head:
        weights += folder_weights(source, VISION_HEAD)
    else:
        notes.append("the vision tower's pooling head, which nothing runs, is left out")
    with new_folder(out) as temporary:
        released = config_to_release(config, processor, dtype, has_head)
        write_atomically(temporary / "config.json", json.dumps(released, indent=2).encode() + b"\n")
        processor.tokenizer.save_pretrained(temporary)
        write_weights(temporary, weights, max_bytes)
    return notes


def _tokenizer(source: Path) -> tuple[HuggingFaceTokenizer, int]:
    """The folder's tokenizer, and the longest prompt that it names."""
    tokenizer = HuggingFaceTokenizer(source)
    loaded = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    vocabulary = loaded.get_vocab()
    if missing := [token for token in SPECIAL_TOKENS if token not in vocabulary]:
        raise InputError(
            f"the tokenizer of {source} lacks {', '.join(missing)}, with which the model was "
            "trained; take the tokenizer files of the release"
        )
    return tokenizer, loaded.model_max_length


def _nested(name: str) -> str:
    """A name as the release has it: newer versions of transformers save the tower less deep."""
    rest = name.removeprefix("vision_model.")
    return name if rest == name or name.startswith(_VISION) else _VISION + rest


def _from_released(name: str) -> str:
    """The trainer's name, which the export maps on."""
    if name.startswith(_PROJECTOR):
        return f"projector.{RELEASED_NAMES[name.removeprefix(_PROJECTOR)]}"
    return name.replace(_VISION, "vision_model.", 1) if name.startswith(_VISION) else name


def _to_released(config: TokenFlexConfig) -> Callable[[str], str]:
    """From the names of an exported model to those of the release."""
    back = {ours: theirs for theirs, ours in RELEASED_NAMES.items()}
    earlier = trainer_names(config.text_config)

    def name_there(name: str) -> str:
        name = renamed(name, earlier)
        part, _, rest = name.partition(".")
        if part == "projector":
            return _PROJECTOR + back[rest]
        return _VISION + rest if part == "vision_model" else name

    return name_there


def _rename(weights: list[Weight], rename: Callable[[str], str]) -> list[Weight]:
    """The weights by other names."""
    return [weight.renamed(rename(weight.name)) for weight in weights]


def _common_dtype(weights: list[Weight]) -> torch.dtype:
    """The format of most numbers."""
    sizes: dict[torch.dtype, int] = {}
    for weight in weights:
        sizes[weight.dtype] = sizes.get(weight.dtype, 0) + weight.num_bytes
    return max(sizes, key=lambda dtype: sizes[dtype])


def _card(form: ModelFolder) -> str:
    return card(
        form.config,
        form.num_image_tokens,
        counts="The release recommends 64 to 576 tokens per tile.",
        accuracy="The conversion was not evaluated; the release's card has the numbers of its "
        "authors.",
        training="Converted from a folder in the layout of Ristretto-3B, which was trained "
        "elsewhere; its settings were not published.",
        data="See the card of the folder that this one was converted from.",
    )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file} is missing; give a model folder") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} is not a JSON object; give a model folder")
    return content
