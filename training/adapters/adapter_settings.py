"""Settings of LoRA adapters: small matrices that train beside a frozen part of the model."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from data_pipeline.config_file import Settings

ALL_LINEAR: Literal["all-linear"] = "all-linear"
MATRICES = ("w1", "w2", "w3")
"""Those of the projector."""


class AdapterSettings(Settings):
    """LoRA beside every matrix that is named; as the `LoraConfig` of PEFT calls them."""

    r: int = Field(gt=0)
    """Rank: columns of the one small matrix, rows of the other."""
    alpha: int | None = Field(None, gt=0)
    """The adapter's product counts alpha / r times; null: as r, which is once."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of an adapter's inputs that is left out in training."""
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = ALL_LINEAR
    """Ends of the names of the layers that get one; all-linear: every Linear but the head."""
    use_rslora: bool = False
    """alpha / sqrt(r) instead of alpha / r."""
    use_dora: bool = False
    """The length of each row of a matrix trains, too."""
    lr: float = Field(1e-4, ge=0)
    """Peak learning rate."""
    load_in_4bit: bool = False
    """Not possible here: see docs/limits.md."""

    @field_validator("target_modules", mode="wrap")
    @classmethod
    def _one_message(cls, value: Any, check: Any) -> Any:
        try:
            return check(value)
        except ValueError as error:
            raise ValueError(f"expected {ALL_LINEAR} or a list as [q_proj, v_proj]") from error

    @field_validator("load_in_4bit")
    @classmethod
    def _no_quantised_base(cls, asked: bool) -> bool:
        if asked:
            raise ValueError(
                "a frozen part in 4 bits (QLoRA) cannot be partitioned and saved by this trainer; "
                "without it the frozen part is kept in bf16, shared out over all GPUs, or with "
                "offload_params=cpu of the engine in host memory; set it to false"
            )
        return asked

    @model_validator(mode="after")
    def _dora_without_dropout(self) -> "AdapterSettings":
        if self.use_dora and self.dropout:
            raise ValueError(
                f"use_dora with dropout={self.dropout} would compute the frozen product a second "
                "time; set dropout to 0, or use_dora to false"
            )
        return self

    @property
    def scale(self) -> float:
        """What an adapter's product is multiplied by."""
        alpha = self.r if self.alpha is None else self.alpha
        return float(alpha / (self.r**0.5 if self.use_rslora else self.r))

    def shape(self) -> dict[str, Any]:
        """What the saved state of an adapter depends on."""
        return self.model_dump(mode="json", exclude={"lr", "dropout"})


class ProjectorAdapterSettings(AdapterSettings):
    """The same beside the projector's matrices, which are no layers: one op takes all of them."""

    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = ALL_LINEAR
    """Of w1, w2 and w3; all-linear: all three."""

    @model_validator(mode="after")
    def _of_its_matrices(self) -> "ProjectorAdapterSettings":
        wrong = [name for name in self.matrices if name not in MATRICES]
        if wrong:
            raise ValueError(
                f"target_modules has {', '.join(wrong)}: the projector's matrices are "
                f"{', '.join(MATRICES)}"
            )
        for name in ("use_dora", "dropout"):
            if getattr(self, name):
                raise ValueError(
                    f"{name} is not possible beside the projector, whose matrices go into one op "
                    "with their adapters; leave it out there, or train the whole projector"
                )
        return self

    def shape(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude={"lr"})

    @property
    def matrices(self) -> list[str]:
        """The names of those that get an adapter."""
        return [*MATRICES] if self.target_modules == ALL_LINEAR else [*self.target_modules]


class StageAdapters(Settings):
    """Which parts of the model have adapters in this stage; null: none."""

    vision_model: AdapterSettings | None = None
    projector: ProjectorAdapterSettings | None = None
    language_model: AdapterSettings | None = None

    @property
    def given(self) -> dict[str, AdapterSettings]:
        """Those that there are, by part."""
        return {name: adapter for name, adapter in self if adapter is not None}

    @property
    def drop_out(self) -> bool:
        """Whether any of them leaves inputs out, which needs random numbers."""
        return any(adapter.dropout for adapter in self.given.values())

    def shapes(self) -> dict[str, Any]:
        """See `AdapterSettings.shape`, by part."""
        return {name: adapter.shape() for name, adapter in self.given.items()}
