"""A config's data opened: tokenizer, indexes, plan and builder, the same for trainer and tools."""

from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig

from data_pipeline.balance import CostModel
from data_pipeline.batch import PackBuilder
from data_pipeline.config_file import load_settings
from data_pipeline.errors import InputError
from data_pipeline.index import load_index
from data_pipeline.loss_weighting import LossWeighting
from data_pipeline.mixture import Dataset, DatasetSettings, Mixture
from data_pipeline.plan import Planner
from data_pipeline.settings import DataConfig, DataSettings
from data_pipeline.storage import Storage
from data_pipeline.tokenizer import Tokenizer, load_tokenizer


@dataclass
class Corpus:
    """What `open_corpus` opens."""

    tokenizer: Tokenizer
    mixture: Mixture
    planner: Planner
    builder: PackBuilder


def open_corpus(
    data: DataSettings,
    seed: int,
    cost: CostModel,
    loss_weighting: LossWeighting = "sqrt",
    epochs: float | None = None,
) -> Corpus:
    """Open everything that training reads.

    epochs: after which the plan ends, see `Planner`.

    Raises:
        InputError: a shard is not indexed, or its index is of other settings.
    """
    tokenizer = load_tokenizer(data.tokenizer)
    mixture = open_mixture(data, tokenizer, data.sources)
    planner = Planner(mixture, data.tiling, data.tokens, data.pack, seed, cost, epochs)
    return Corpus(
        tokenizer, mixture, planner, make_builder(data, mixture, tokenizer, loss_weighting)
    )


def open_mixture(
    data: DataSettings, tokenizer: Tokenizer, sources: dict[str, DatasetSettings]
) -> Mixture:
    """Load the index of each dataset."""
    storage = Storage(data.storage)
    return Mixture(
        [
            Dataset(
                name,
                load_index(source.shards, tokenizer, data.chat, data.index_dir, storage),
                source.weight,
                source.repeat,
            )
            for name, source in sources.items()
        ]
    )


def make_builder(
    data: DataSettings,
    mixture: Mixture,
    tokenizer: Tokenizer,
    loss_weighting: LossWeighting = "sqrt",
) -> PackBuilder:
    """The builder of packs of a mixture, for training."""
    return PackBuilder(
        mixture,
        tokenizer,
        data.chat,
        data.tiling,
        loss_weighting,
        data.loader.reduced_jpeg,
        data.loader.resample,
    )


def make_exact_builder(data: DataSettings, mixture: Mixture, tokenizer: Tokenizer) -> PackBuilder:
    """The builder of packs for evaluation: pictures are decoded whole and resized by Pillow."""
    return PackBuilder(
        mixture, tokenizer, data.chat, data.tiling, reduced_jpeg=False, resample="pillow"
    )


def cost_of(vision: dict[str, Any], llm: dict[str, Any]) -> CostModel:
    """What packs cost in a model of these architectures: the `config` of each backbone.

    transformers fills in what the configurations leave to its defaults.
    """
    try:
        full = [AutoConfig.for_model(**config).to_dict() for config in (vision, llm)]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"the model section does not describe a model: {error}") from error
    return CostModel.from_configs(*full)


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
    cost = cost_of(config.model.vision.config, config.model.llm.config)
    return config, open_corpus(config.data, config.seed, cost, epochs=config.train.epochs)
