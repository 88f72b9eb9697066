"""A model folder that transformers loads: everything in it but the weights' values."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.dynamic_module_utils import custom_object_save

from data_pipeline.errors import InputError
from data_pipeline.files import write_atomically, written_aside
from data_pipeline.tiling import TilingSettings
from training.export.safetensors_files import write_weights
from training.export.weights import Weight, check_weights
from training.model.hub import (
    TokenFlexConfig,
    TokenFlexForConditionalGeneration,
    TokenFlexImageProcessor,
    TokenFlexProcessor,
    chatml_template,
)
from training.model.hub.language_model_tokenflex import EARLIER_NAMES, renamed
from training.model.hub.modeling_tokenflex import AUTO_MAP


@dataclass(frozen=True)
class ModelFolder:
    """What a folder is made of.

    config: the model's. dtype: what it is loaded in. tokenizer: a fast one of transformers, with
    the markers. num_image_tokens: per tile, where a user gives none. system: the prompt's, empty
    for none. source: where the weights came from, for messages. image_newline: see
    `chatml_template`.
    """

    config: TokenFlexConfig
    dtype: torch.dtype
    tokenizer: Any
    tiling: TilingSettings
    num_image_tokens: int
    system: str
    source: str
    image_newline: bool = False

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that the model loads."""
        return tensor_shapes(self._model())

    def write(self, folder: Path, weights: list[Weight], card: str, max_bytes: int) -> None:
        """Write all files; InputError unless the weights, of any layout, are the model's."""
        model = self._model()
        weights = [weight.renamed(renamed(weight.name, EARLIER_NAMES)) for weight in weights]
        found = {weight.name: weight.shape for weight in weights}
        check_weights(found, tensor_shapes(model), self.source)
        model.config.architectures = [type(model).__name__]
        custom_object_save(model, folder)
        model.config.auto_map = dict(AUTO_MAP)
        model.config.save_pretrained(folder)
        GenerationConfig(
            eos_token_id=self.tokenizer.convert_tokens_to_ids("<|im_end|>"),
            pad_token_id=self.tokenizer.pad_token_id,
            suppress_tokens=model.generation_config.suppress_tokens,
        ).save_pretrained(folder)
        self._processor().save_pretrained(folder)
        write_atomically(folder / "README.md", card.encode())
        write_weights(folder, weights, max_bytes)

    def _model(self) -> TokenFlexForConditionalGeneration:
        """The model without memory for its weights."""
        with torch.device("meta"):
            model = TokenFlexForConditionalGeneration._from_config(self.config, dtype=self.dtype)
        assert isinstance(model, TokenFlexForConditionalGeneration)
        return model

    def _processor(self) -> TokenFlexProcessor:
        tiling = self.tiling
        self.tokenizer.padding_side = "left"  # whatever the one of training preferred
        return TokenFlexProcessor(
            TokenFlexImageProcessor(
                tile_size=self.config.tile_size,
                min_tiles=tiling.min_tiles,
                max_tiles=tiling.max_tiles,
                thumbnail=tiling.thumbnail,
            ),
            self.tokenizer,
            chat_template=chatml_template(self.system, self.image_newline),
            num_image_tokens=self.num_image_tokens,
            patches_per_side=min(self.config.patch_grid),
        )


def tensor_shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter and saved buffer; tied ones once, by their first name."""
    seen: set[int] = set()
    shapes = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            shapes[name] = tuple(tensor.shape)
        seen.add(id(tensor))
    return shapes


def new_folder(out: Path) -> AbstractContextManager[Path]:
    """A folder that becomes `out` when all in it is written, as in `written_aside`.

    Raises:
        InputError: if `out` is there and not an empty folder.
    """

    def check() -> None:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(
                f"{out} is there already and not empty; remove it or give another name"
            )

    return written_aside(out, check)
