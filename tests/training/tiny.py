"""A random model of a few thousand parameters, its processor, and pictures, made in a moment."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data_pipeline.processor.prompt_tokenflex import DEFAULT_SYSTEM
from tests.data_pipeline.small_tokenizers import save_hugging_face
from training.model import TokenFlexConfig, TokenFlexImageProcessor, TokenFlexProcessor
from training.model.hub.language_model_tokenflex import renamed, trainer_names

TILE, GRID = 16, 4
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": TILE,
    "patch_size": TILE // GRID,
}
TEXT = {
    "model_type": "qwen2",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,  # large enough for every path to matter in the outputs
    "tie_word_embeddings": False,
}


def make_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(save_hugging_face(folder))


def make_processor(folder: Path, **changes: Any) -> TokenFlexProcessor:
    """Up to four tiles an image, at most 16 tokens a tile."""
    images = TokenFlexImageProcessor(tile_size=TILE, max_tiles=4)
    settings = {"num_image_tokens": 4, "patches_per_side": GRID, **changes}
    return TokenFlexProcessor(images, make_tokenizer(folder), **settings)


def prompt(text: str) -> str:
    """What the default template renders for a user's words."""
    turns = (("system", DEFAULT_SYSTEM), ("user", text))
    said = "".join(f"<|im_start|>{role}\n{words}<|im_end|>\n" for role, words in turns)
    return f"{said}<|im_start|>assistant\n"


def make_config(
    processor: TokenFlexProcessor, text: dict[str, Any] | None = None, **changes: Any
) -> TokenFlexConfig:
    text = {**TEXT, "vocab_size": len(processor.tokenizer), **(text or {})}
    changes = {"image_token_id": processor.image_token_id, **changes}
    return TokenFlexConfig(vision_config=dict(VISION), text_config=text, **changes)


def make_model(
    kind: Any,
    processor: TokenFlexProcessor,
    text: dict[str, Any] | None = None,
    seed: int = 0,
    **changes: Any,
) -> Any:
    """A model of the class `kind` in evaluation mode; equal seeds give equal weights."""
    torch.manual_seed(seed)
    model = kind(make_config(processor, text, **changes)).eval()
    model.generation_config.eos_token_id = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    return model


def earlier_name(model: Any, name: str) -> str:
    """An exported model's parameter by the name that checkpoints and earlier folders have."""
    return renamed(name, trainer_names(model.config.text_config))


def earlier_weights(model: Any) -> dict[str, torch.Tensor]:
    """All of an exported model's weights by those names."""
    return {earlier_name(model, name): value for name, value in model.state_dict().items()}


def picture(seed: int = 0, width: int = 40, height: int = 30) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)
