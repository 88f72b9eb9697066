"""The settings that ask for speed: refused before a run, or carried out on its model."""

from collections.abc import Iterator

import torch
from torch import nn

from data_pipeline.errors import InputError
from training.config import RunConfig
from training.distributed import Ranks
from training.model.projector_choice import obstacles_of_ranks
from training.speed.compiled_layers import compile_layers, compile_obstacle
from training.speed.flash_attention import activate_fa3, fa3_obstacle, fa3_refusal
from training.speed.liger_decoder import apply_liger, liger_obstacle, liger_refusal

_TWICE = (
    "train.compile_layers fuses the language model's norms and SwiGLU, too, and is not tested with "
    "Liger's; take one of them, or train.compile_layers=[vision_model]"
)


def check_settings(config: RunConfig) -> None:
    """Refuse what the settings alone rule out, on any machine.

    Raises:
        InputError: naming the setting, what keeps it from working and what to do.
    """
    for setting, obstacle in _refused(config):
        raise InputError(f"{setting}: {obstacle}")


def check_machine(config: RunConfig, ranks: Ranks) -> None:
    """Refuse what a rank's machine cannot do: collective where something is asked for.

    Raises:
        InputError: on every rank, naming the setting, the rank and what to do.
    """
    check_settings(config)
    for setting, obstacle in obstacles(config, ranks.device):
        if found := obstacles_of_ranks(obstacle or "", ranks):
            raise InputError(f"{setting}: {found}")


def make_faster(model: nn.Module, config: RunConfig) -> None:
    """Carry out on a model what the settings ask for; `check_machine` has let them pass."""
    train = config.train
    if train.decoder_impl == "liger":
        apply_liger(model.get_submodule("language_model"))
    if train.flash_attention == "fa3":
        activate_fa3()
    if train.compiled:
        compile_layers(model, train.compiled)


def _refused(config: RunConfig) -> Iterator[tuple[str, str]]:
    train = config.train
    if train.decoder_impl == "liger" and (text := liger_refusal(config.model.llm.config)):
        yield "train.decoder_impl=liger", text
    if train.decoder_impl == "liger" and "language_model" in train.compiled:
        yield "train.decoder_impl=liger", _TWICE
    if train.flash_attention == "fa3" and (text := fa3_refusal(train.precision)):
        yield "train.flash_attention=fa3", text


def obstacles(config: RunConfig, device: torch.device) -> Iterator[tuple[str, str | None]]:
    """(setting, what keeps this machine from it) of all that is asked for; None: nothing does."""
    train = config.train
    if train.decoder_impl == "liger":
        yield "train.decoder_impl=liger", liger_obstacle(device)
    if train.flash_attention == "fa3":
        yield "train.flash_attention=fa3", fa3_obstacle(device)
    if train.compiled:
        yield "train.compile_layers", compile_obstacle(device)
