"""The settings of the data: the `data` section of a config, and what of it the tools read."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from data_pipeline.chat import ChatSettings
from data_pipeline.draw import TokenCountSettings
from data_pipeline.loader import LoaderSettings
from data_pipeline.mixture import SINGLE, DatasetSettings
from data_pipeline.plan import PackSettings
from data_pipeline.storage import StorageSettings
from data_pipeline.tiling import TilingSettings


class PrepareSettings(BaseModel):
    """A demo corpus that the trainer writes itself when it is missing."""

    model_config = ConfigDict(extra="forbid")

    format: Literal["digits", "grid"]
    out: Path
    train_samples: int = Field(24_000, gt=0)
    eval_samples: int = Field(600, gt=0)
    seed: int = 0


class DataSettings(BaseModel):
    """What is trained on, and how samples become packs."""

    model_config = ConfigDict(extra="forbid")

    shards: list[str] = []
    """Folders of *.tar files, globs, brace patterns or URLs, indexed by `data_pipeline.index`."""
    datasets: dict[str, DatasetSettings] = {}
    """Instead of `shards`: several datasets by name, each with its weight and repeats."""
    eval_shards: list[str] = []
    index_dir: Path | None = None
    """Folder of the indexes; null: beside the shards. Needed for URLs and read-only folders."""
    tokenizer: str
    """A sentencepiece .model file, a Hugging Face folder or a hub name."""
    prepare: PrepareSettings | None = None
    allow_change: bool = False
    """On resume, accept other data, seed or settings of the order: a new window starts."""
    chat: ChatSettings = ChatSettings()
    tiling: TilingSettings = TilingSettings()
    tokens: TokenCountSettings = TokenCountSettings()
    pack: PackSettings
    loader: LoaderSettings = LoaderSettings()
    storage: StorageSettings = StorageSettings()

    @model_validator(mode="after")
    def _one_source(self) -> "DataSettings":
        if bool(self.shards) == bool(self.datasets):
            raise ValueError("give either shards, or datasets with their names and weights")
        weights = [dataset.weight for dataset in self.datasets.values()]
        if None in weights and any(weight is not None for weight in weights):
            raise ValueError("give each of the datasets a weight, or none of them")
        return self

    @property
    def sources(self) -> dict[str, DatasetSettings]:
        """The datasets by name, also where `shards` is given."""
        return self.datasets or {SINGLE: DatasetSettings(shards=self.shards)}


class BackboneArchitectures(BaseModel):
    """What of the `model` section decides how much a pack costs."""

    vision: dict[str, Any]
    llm: dict[str, Any]


class DataConfig(BaseModel):
    """What the data tools read of a training config; its other sections are not looked at."""

    seed: int = 0
    data: DataSettings
    model: BackboneArchitectures
