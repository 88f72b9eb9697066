"""An exported folder as a model that answers; its code is this repository's, not the folder's."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.utils.logging import disable_progress_bar

from data_pipeline.errors import InputError
from data_pipeline.machine import cpu_model
from data_pipeline.paths import path_text
from data_pipeline.pretrained_source import check_source
from data_pipeline.processor.arguments_tokenflex import side_of
from training.model.hub import (
    TokenFlexConfig,
    TokenFlexForConditionalGeneration,
    TokenFlexProcessor,
)
from training.precision import has_fast_bf16

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@contextmanager
def user_errors(prefix: str = "") -> Iterator[None]:
    """What the model's files say of wrong arguments, as `InputError`: one line for the user."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, OSError) as error:
        lines = str(error).strip().splitlines() or [repr(error)]
        raise InputError(prefix + lines[0]) from error


@dataclass
class LoadedModel:
    """A model in evaluation mode on its device, and its processor; `source` is the folder."""

    model: Any
    processor: Any
    device: torch.device
    source: str

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.model.dtype

    @property
    def device_name(self) -> str:
        """The GPU's name, or the processor's."""
        cuda = self.device.type == "cuda"
        return torch.cuda.get_device_name(self.device) if cuda else cpu_model()

    @property
    def patches_per_side(self) -> int:
        """Side of a tile's patch grid; its square is the largest token count."""
        return int(self.processor.patches_per_side)

    @property
    def trained_counts(self) -> list[int] | None:
        """Token counts that were trained, where the export has noted them in the config."""
        counts = getattr(self.config, "trained_num_image_tokens", None)
        return sorted(map(int, counts)) if counts else None

    @property
    def context(self) -> int | None:
        """Longest sequence the language model was made for."""
        return getattr(self.config.text_config, "max_position_embeddings", None)

    def check_counts(self, counts: Sequence[int], name: str = "--num-image-tokens") -> list[int]:
        """The counts, ascending; InputError for one that the patch grid cannot give."""
        with user_errors(f"{name}: "):
            for count in counts:
                side_of(count, self.patches_per_side)
        return sorted(set(counts))

    def on_device(self, inputs: Any) -> dict[str, Any]:
        """The processor's output, on the model's device."""
        return {
            # The sides stay on the host, where they are read: moving them would be waited for.
            name: value if name == "tile_sides" else value.to(self.device)
            for name, value in inputs.items()
        }


def load_model(
    source: str,
    dtype: str = "auto",
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load an exported folder, or a name on the Hugging Face hub.

    Args:
        source: the folder or name.
        dtype: a key of `DTYPES`; "auto" takes that of the weights, but float32 where bfloat16 is
            slow.
        device: where to; None takes the GPU if there is one.
        trust_remote_code: load a model of another type with the code that comes with it.

    Raises:
        InputError: nothing can be loaded from there, or it is another kind of model.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    check_source(
        source, f"the model folder {source}", "one that training.export wrote, or a name on the hub"
    )
    if Path(source).exists() and not (Path(source) / "config.json").is_file():
        raise InputError(
            f"{source} has no config.json; give a folder that training.export wrote (a checkpoint "
            "is exported first)"
        )
    if not trust_remote_code:
        _check_kind(source)
    if not sys.stderr.isatty():
        disable_progress_bar()
    kinds: tuple[Any, Any] = (TokenFlexForConditionalGeneration, TokenFlexProcessor)
    if trust_remote_code:
        kinds = (AutoModelForImageTextToText, AutoProcessor)
    try:
        processor = kinds[1].from_pretrained(source, trust_remote_code=trust_remote_code)
        model = kinds[0].from_pretrained(
            source, trust_remote_code=trust_remote_code, dtype=_dtype(source, dtype, device)
        )
    except Exception as error:  # the library raises many kinds
        text = (str(error).strip() or repr(error)).splitlines()[0]
        raise InputError(f"no model could be loaded from {source}: {text}") from error
    return LoadedModel(model.to(device).eval(), processor, device, source)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, --dtype and --trust-remote-code."""
    parser.add_argument(
        "model",
        type=path_text,
        metavar="MODEL",
        help="folder that training.export wrote, or a name on the hub",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="number format of the weights (auto: as saved; float32 where bfloat16 is slow)",
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="for a MODEL of another type: run the code that comes with it",
    )


def _check_kind(source: str) -> None:
    """InputError unless this repository's code knows the model."""
    try:
        config, _ = TokenFlexConfig.get_config_dict(source)
    except OSError as error:
        text = str(error).strip().splitlines()[0]
        raise InputError(
            f"no model at {source}: {text}; give a folder that training.export wrote"
        ) from error
    found = config.get("model_type")
    if found != TokenFlexConfig.model_type:
        raise InputError(
            f"{source} holds a model of type {found!r}, expected {TokenFlexConfig.model_type!r}; "
            "export a checkpoint with training.export, or pass --trust-remote-code to run the "
            "model's own code"
        )


def _dtype(source: str, name: str, device: torch.device) -> torch.dtype | str:
    if name != "auto":
        return DTYPES[name]
    saved = AutoConfig.from_pretrained(source).dtype if not _has_other_code(source) else None
    slow = saved in (torch.bfloat16, torch.float16) and not has_fast_bf16(device)
    return torch.float32 if slow else saved or "auto"


def _has_other_code(source: str) -> bool:
    return (
        TokenFlexConfig.get_config_dict(source)[0].get("model_type") != TokenFlexConfig.model_type
    )
