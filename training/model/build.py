"""From settings to a model: architectures from the config, weights from a folder or a hub."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from data_pipeline.errors import InputError
from data_pipeline.pretrained_source import check_source
from data_pipeline.tokenizer import Tokenizer
from training.config import BackboneSettings, ModelSettings, RunConfig
from training.model import PackedTokenFlex, TokenFlexConfig
from training.model.attention import ATTENTION_NAME
from training.model.new_rows import Whole, begin_at_the_mean

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

# Keys of a backbone's config that do not change what it computes.
_WITHOUT_EFFECT = frozenset(
    [
        "_name_or_path",
        "architectures",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "is_encoder_decoder",
        "label2id",
        "max_window_layers",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "transformers_version",
        "use_cache",
        "vocab_size",
    ]
)

# What makes the projector: the setting below `model` -> the key of the model's configuration.
_PROJECTOR = {
    "projector.method": "projector_method",
    "projector.num_tokens": "projector_num_tokens",
    "pool": "pool",
    "projector_hidden_ratio": "projector_hidden_ratio",
}


def model_config(settings: ModelSettings, vocab_size: int, image_token_id: int) -> TokenFlexConfig:
    """The transformers configuration of a run's model.

    Args:
        settings: the `model` section.
        vocab_size: of the tokenizer, special tokens included; the language model's grows to it.
        image_token_id: id of `<IMG_CONTEXT>`.
    """
    llm = dict(settings.llm.config)
    llm["vocab_size"] = max(vocab_size, llm.get("vocab_size", 0))
    try:
        return TokenFlexConfig(
            vision_config=settings.vision.config,
            text_config=llm,
            projector_method=settings.projector.method,
            projector_num_tokens=settings.projector.num_tokens,
            pool=settings.pool,
            projector_hidden_ratio=settings.projector_hidden_ratio,
            image_token_id=image_token_id,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"the model section does not describe a model: {error}") from error


def build_model(
    config: RunConfig,
    tokenizer: Tokenizer,
    pretrained: bool = True,
    on_meta: bool = False,
    whole: Whole = nullcontext,
) -> PackedTokenFlex:
    """Build the model, from random weights or pretrained ones per part.

    Where the engine has announced itself to transformers, parameters are partitioned as they are
    made, and pretrained weights are read by rank 0 only.

    Tokens that a pretrained language model has no rows for, or that the tokenizer lacked, begin at
    the mean of the others.

    on_meta: without values, on the meta device; pretrained weights are compared by name and shape.
    whole: see `training.model.new_rows`.

    Raises:
        InputError: if pretrained weights do not fit the architecture; it names the part.
    """
    settings, dtype = config.model, DTYPES[config.train.precision]
    image_token_id = tokenizer.special_id("<IMG_CONTEXT>")
    full = model_config(settings, tokenizer.vocab_size, image_token_id)
    model: Any
    if settings.pretrained and pretrained:
        model = _whole(settings.pretrained, full, dtype, on_meta)
    else:
        with torch.device("meta") if on_meta else nullcontext():
            model = _random(full, dtype)
    if settings.projector.method == "pool":
        model.projector.backward_mode = config.train.projector_backward
        model.projector.impl = config.train.projector_impl
    parts = pretrained and not settings.pretrained
    if settings.vision.pretrained and parts:
        model.vision_model = _pretrained("vision", settings.vision, model, on_meta)
    if settings.llm.pretrained and parts:
        llm = _pretrained("llm", settings.llm, model, on_meta)
        known, size = llm.config.vocab_size, full.text_config.vocab_size
        if known != size:
            llm.resize_token_embeddings(size, mean_resizing=False)
        new = sorted({*tokenizer.appended, *range(known, size)})
        if new and not on_meta:
            begin_at_the_mean(llm, new, known, whole)
        model.language_model = llm
    return model


def _random(config: TokenFlexConfig, dtype: torch.dtype) -> PackedTokenFlex:
    """The model with random weights; InputError where transformers cannot build what is asked."""
    try:
        return PackedTokenFlex._from_config(config, dtype=dtype)
    except (InputError, torch.distributed.DistError, torch.OutOfMemoryError):
        raise
    except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        cause = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"no model can be built from model.vision.config and model.llm.config: {cause}; "
            "correct what it names"
        ) from error


def _whole(
    path: str, config: TokenFlexConfig, dtype: torch.dtype, on_meta: bool
) -> PackedTokenFlex:
    """The model of an exported folder, after checking that it is the one of the settings."""
    _check_folder("model.pretrained", path)
    try:
        kind = TokenFlexConfig.get_config_dict(path)[0].get("model_type")
        found = TokenFlexConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise InputError(f"model.pretrained: cannot load {path}: {error}") from error
    if kind != TokenFlexConfig.model_type:
        raise InputError(
            f"model.pretrained={path} is of model_type {kind}, not an exported model; weights of "
            "one part are for model.vision.pretrained and model.llm.pretrained"
        )
    keys = ("image_token_id", "image_mean", "image_std")
    different = [
        f"{key} is {getattr(found, key)!r} there and {getattr(config, key)!r} here"
        for key in (*_PROJECTOR.values(), *keys)
        if getattr(found, key) != getattr(config, key)
    ]
    for part in ("vision_config", "text_config"):
        different += _differences(getattr(found, part), getattr(config, part)).values()
    if found.text_config.vocab_size != config.text_config.vocab_size:
        different.append("the vocabulary has another size; use the folder's own tokenizer")
    if different:
        raise InputError(
            f"model.pretrained={path} is another model: {'; '.join(different)}. Correct the model "
            "section and data.tokenizer"
        )
    name, loader = "model.pretrained", PackedTokenFlex
    return _loaded(name, path, loader, config, dtype, ATTENTION_NAME, on_meta)


def _check_folder(name: str, path: str) -> None:
    """Of a folder without a configuration transformers would make up one; a missing one is none."""
    check_source(path, f"{name}={path}", "a folder with config.json, or a name on the hub")
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise InputError(
            f"{name}={path} has no config.json, so it is no model; a run or checkpoint of this "
            "trainer is for checkpoint.init_from, or exported first (python -m training.export)"
        )


def pretrained_config(name: str, path: str) -> Any:
    """The configuration beside the weights that the setting `name` gives; InputError without."""
    _check_folder(name, path)
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: cannot load {path}: {error}") from error


def _pretrained(
    part: str, settings: BackboneSettings, model: PreTrainedModel, on_meta: bool
) -> PreTrainedModel:
    """The pretrained backbone, after checking that it has the architecture of the settings."""
    path = str(settings.pretrained)
    name = f"model.{part}.pretrained"
    found = pretrained_config(name, path)
    loader: Any = AutoModelForCausalLM
    wanted = model.config.text_config
    if part == "vision":
        family, wanted = model.config.vision_family, model.config.vision_config
        loader, found = family.model_class, family.complete(found)
    # Of all keys, also of those that the settings leave out: a resume builds from the settings.
    different = [*_differences(found, wanted).values()]
    found_vocab = getattr(found, "vocab_size", 0) if part == "llm" else 0
    vocab_size = model.config.text_config.vocab_size
    if found_vocab > vocab_size:
        different.append(f"vocab_size is {found_vocab} there and {vocab_size} here")
    if different:
        raise InputError(
            f"{name}={path} is another architecture: {'; '.join(different)}. Correct "
            f"model.{part}.config"
        )
    attention = model.config._attn_implementation
    return _loaded(name, path, loader, found, model.dtype, attention, on_meta)


def section_differences(found: ModelSettings, wanted: ModelSettings) -> dict[str, str]:
    """The settings in which two model sections describe different computations, in words each.

    A key that is left out counts as what it then is; the size of the vocabulary is not compared.
    """
    there, here = (model_config(settings, 1, 0) for settings in (found, wanted))
    different = {
        f"model.{name}": f"{key} is {getattr(there, key)!r} there and {getattr(here, key)!r} here"
        for name, key in _PROJECTOR.items()
        if getattr(there, key) != getattr(here, key)
    }
    for name, part in (("vision", "vision_config"), ("llm", "text_config")):
        named = {key for section in (found, wanted) for key in getattr(section, name).config}
        for key, text in _differences(getattr(there, part), getattr(here, part)).items():
            if key != "layer_types" or key in named:  # else it follows from the number of layers
                different[f"model.{name}.config.{key}"] = text
    return different


def _differences(found: PreTrainedConfig, wanted: PreTrainedConfig) -> dict[str, str]:
    """The keys in which two configs describe different computations, in words each."""
    there, here = found.to_dict(), wanted.to_dict()
    keys = sorted(here.keys() - _WITHOUT_EFFECT)
    if found.model_type != wanted.model_type:
        keys = ["model_type"]
    return {
        key: f"{key} is {there.get(key)!r} there and {here.get(key)!r} here"
        for key in keys
        if there.get(key) != here.get(key)
    }


def _loaded(
    name: str,
    path: str,
    loader: Any,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    attention: Any,
    on_meta: bool,
) -> Any:
    """A model with its weights; InputError, naming them, where tensors lack or do not fit."""
    try:
        model, report = loader.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            ignore_mismatched_sizes=True,  # they are named below
            output_loading_info=True,
            **({"device_map": "meta"} if on_meta else {}),
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{name}: cannot load {path}: {error}") from error
    problems = [f"it lacks {', '.join(sorted(report['missing_keys']))}"] * bool(
        report["missing_keys"]
    )
    problems += [
        f"{key} is {list(there)} there and {list(here)} by its config"
        for key, there, here in sorted(report["mismatched_keys"])
    ]
    if problems:
        raise InputError(
            f"the weights in {name}={path} do not fit its config: {'; '.join(problems)}"
        )
    return model
