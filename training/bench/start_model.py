"""The weights that every arm starts from: a random model as an exported folder."""

from pathlib import Path

import torch

from data_pipeline.tokenizer import load_tokenizer
from training.config import RunConfig
from training.export.hub_tokenizer import to_hub_tokenizer
from training.export.model_folder import ModelFolder, new_folder
from training.export.weights import Weight
from training.model.build import DTYPES, build_model, model_config


def write_start(config: RunConfig, folder: Path) -> None:
    """Write a model of the config with random weights, in the format of `training.export`."""
    tokenizer = load_tokenizer(config.data.tokenizer)
    dtype = DTYPES[config.train.precision]
    torch.manual_seed(config.seed)
    model = build_model(config, tokenizer, pretrained=False)
    image_token = tokenizer.special_id("<IMG_CONTEXT>")
    full = model_config(config.model, tokenizer.vocab_size, image_token)
    form = ModelFolder(
        full,
        dtype,
        to_hub_tokenizer(tokenizer, full.text_config.max_position_embeddings),
        config.data.tiling,
        max(config.data.tokens.counts),
        config.data.chat.system,
        "the random model",
    )
    with new_folder(folder) as temporary:
        form.write(temporary, _weights(model, dtype), "A random model, to start from.\n", 10**9)


def _weights(model: torch.nn.Module, dtype: torch.dtype) -> list[Weight]:
    return [
        Weight(name, tuple(value.shape), dtype, value.detach().contiguous)
        for name, value in model.state_dict().items()
    ]
