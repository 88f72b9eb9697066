"""From a checkpoint of the trainer to a model folder."""

from dataclasses import replace
from pathlib import Path

import torch

from training.export.adapter_folder import (
    APART,
    FOLDER,
    check_adapters,
    split_pieces,
    write_adapter,
)
from training.export.card import run_card
from training.export.hub_tokenizer import to_hub_tokenizer
from training.export.model_folder import ModelFolder, new_folder
from training.export.trained_run import TrainedRun, open_run
from training.export.weights import checkpoint_weights
from training.model.build import DTYPES, model_config
from training.model.known_counts import note_counts


def export(
    path: Path,
    out: Path,
    *,
    dtype: str | None = None,
    max_bytes: int = 5 * 10**9,
    config: Path | None = None,
    tokenizer: str | None = None,
    adapter: bool = False,
    ema: bool = False,
) -> TrainedRun:
    """Write a checkpoint as a folder for `from_pretrained`; returns what it was made from.

    Args:
        path: a checkpoint, or a run's output_dir, whose newest whole checkpoint is taken.
        out: a folder that does not exist yet, or is empty.
        dtype: "bf16" or "fp32"; None: as the model computed in training. Master weights are fp32,
            but evaluation saw them in the precision of training.
        max_bytes: of one weights file.
        config, tokenizer: see `open_run`.
        adapter: leave the adapters of tower and language model out of the weights, and write them
            as `out`/adapter, for PEFT; else they are merged.
        ema: the moving average of the weights (`train.ema`), which was not evaluated in training.

    Raises:
        InputError: see `open_run`; or `out` is in use, the tokenizer cannot be converted, the
            weights do not fit the config, there is no average, or no adapter that PEFT would load.
    """
    with new_folder(out) as temporary:
        run = open_run(path, config, tokenizer)
        if ema:
            run = replace(run, evaluation=[])  # which is of the weights themselves
        form = _form(run, DTYPES[dtype or run.precision])
        adapters, world_size = run.manifest.adapters, run.manifest.world_size
        if adapter:
            check_adapters(adapters, run.checkpoint)
        apart = APART if adapter else ()
        weights = checkpoint_weights(run.checkpoint, world_size, form.dtype, adapters, apart, ema)
        weights, pieces = split_pieces(weights)
        card = run_card(run, form.config, form.num_image_tokens)
        form.write(temporary, weights, card, max_bytes)
        if adapter:
            write_adapter(temporary / FOLDER, pieces, adapters, str(out))
    return run


def _form(run: TrainedRun, dtype: torch.dtype) -> ModelFolder:
    settings, tokenizer = run.config, run.tokenizer
    image_token_id = tokenizer.special_id("<IMG_CONTEXT>")
    config = model_config(settings.model, tokenizer.vocab_size, image_token_id)
    trained = [n * n for n in settings.data.tokens.trained_sides]
    note_counts(config, trained, run.evaluation)
    context = getattr(config.text_config, "max_position_embeddings", 10**9)
    return ModelFolder(
        config,
        dtype,
        to_hub_tokenizer(tokenizer, context),
        settings.data.tiling,
        max(trained),
        settings.data.chat.system,
        str(run.checkpoint),
    )
