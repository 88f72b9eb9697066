"""The settings of the data: the `data` section of a config, and what of it the tools read."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from data_pipeline.backbone_config import BackboneConfig, tile_side
from data_pipeline.backbone_folder import with_architecture
from data_pipeline.chat import ChatSettings
from data_pipeline.config_file import Settings
from data_pipeline.draw import TokenCountSettings
from data_pipeline.loader import LoaderSettings
from data_pipeline.mixture import SINGLE, DatasetSettings
from data_pipeline.paths import FilePath, PathText
from data_pipeline.plan import PackSettings
from data_pipeline.storage import StorageSettings
from data_pipeline.tiling import TilingSettings

Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
"""What torch and numpy take."""


class PrepareSettings(Settings):
    """A demo corpus that the trainer writes itself when it is missing."""

    format: Literal["digits", "scans", "grid", "pages"]
    out: FilePath
    train_samples: int = Field(24_000, gt=0)
    eval_samples: int = Field(600, gt=0)
    seed: Seed = 0


class DataSettings(Settings):
    """What is trained on, and how samples become packs."""

    shards: list[PathText] = Field([])
    """Folders of *.tar files, globs, brace patterns or URLs, indexed by `data_pipeline.index`."""
    datasets: dict[str, DatasetSettings] = Field({})
    """Instead of `shards`: several datasets by name, each with its weight and repeats."""
    eval_shards: list[PathText] = Field([])
    index_dir: FilePath | None = None
    """Folder of the indexes; null: beside the shards. Needed for URLs and read-only folders."""
    tokenizer: PathText
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

    def fit_tiles_to(self, tower: dict[str, Any]) -> None:
        """Make tiles as large as the tower's images, unless their size is given."""
        size = tile_side(tower)
        if size is not None and "tile_size" not in self.tiling.model_fields_set:
            self.tiling = self.tiling.model_copy(update={"tile_size": size})

    @property
    def sources(self) -> dict[str, DatasetSettings]:
        """The datasets by name, also where `shards` is given."""
        return self.datasets or {SINGLE: DatasetSettings(shards=self.shards)}


class Architecture(Settings, extra="ignore"):
    """Of a backbone, its architecture: given, or that of its pretrained weights."""

    config: BackboneConfig

    @model_validator(mode="before")
    @classmethod
    def _of_the_weights(cls, section: Any) -> Any:
        return with_architecture(section)


class BackboneArchitectures(Settings, extra="ignore"):
    """What of the `model` section decides how much a pack costs."""

    vision: Architecture
    llm: Architecture


class Length(Settings, extra="ignore"):
    """What of the `train` section decides where the plan ends."""

    either = ("steps", "epochs")
    epochs: float | None = Field(None, gt=0, le=1e6)
    """Instead of steps: the run ends when every sample has come so often, times its dataset's
    `repeat`. A start counts the steps that is; with `train.steps` given, too, they must agree."""


class DataConfig(Settings, extra="ignore"):
    """What the data tools read of a training config; its other sections are not looked at."""

    seed: Seed = 0
    data: DataSettings
    model: BackboneArchitectures
    train: Length = Length()

    @model_validator(mode="after")
    def _tiles_of_the_tower(self) -> "DataConfig":
        self.data.fit_tiles_to(self.model.vision.config)
        return self
