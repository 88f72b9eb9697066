"""What the command lines that read a training config have in common."""

import argparse

from data_pipeline.config_file import load_settings
from data_pipeline.corpus import Corpus, cost_of, open_corpus
from data_pipeline.errors import InputError
from data_pipeline.settings import DataConfig


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """`options.config`, `options.overrides`: the config of a training run and changes to it."""
    parser.add_argument("config", metavar="CONFIG.yaml", help="the config of the training run")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings to change, as for training"
    )


def open_config(path: str, overrides: list[str]) -> tuple[DataConfig, Corpus]:
    """Read a training config and open its data.

    Raises:
        InputError: a setting is wrong, the demo corpus is not there yet, or a shard is not indexed.
    """
    config = load_settings(DataConfig, path, overrides)
    prepare = config.data.prepare
    if prepare is not None and not prepare.out.exists():
        raise InputError(
            f"{prepare.out} is not there yet: training with {path} writes it, or run "
            f"python -m data_pipeline.prepare --format {prepare.format} {prepare.out} and "
            "python -m data_pipeline.index on its folders"
        )
    vision, llm = config.model.vision.get("config"), config.model.llm.get("config")
    if not isinstance(vision, dict) or not isinstance(llm, dict):
        raise InputError(f"{path}: model.vision.config and model.llm.config must be mappings")
    return config, open_corpus(config.data, config.seed, cost_of(vision, llm))


def at_least(smallest: int) -> "type[int]":
    """A type for argparse: an integer from `smallest` on."""

    class Whole(int):
        def __new__(cls, text: str) -> "Whole":
            value = super().__new__(cls, text)
            if value < smallest:
                raise argparse.ArgumentTypeError(f"must be at least {smallest}, found {text}")
            return value

    Whole.__name__ = "integer"  # what argparse says is expected
    return Whole
