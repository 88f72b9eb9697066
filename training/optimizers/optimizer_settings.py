"""Which optimizer takes the steps."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from data_pipeline.config_file import Settings


class EmaSettings(Settings):
    """A moving average of the weights, kept in host memory and in the checkpoints, for export."""

    decay: float = Field(0.999, gt=0, lt=1)
    """What is left of the average at each update."""
    every: int = Field(1, gt=0)
    """Steps between updates."""


class OptimizerSettings(Settings):
    """The optimizer by name; its betas, eps and weight decay are those of `train`."""

    name: Literal["adamw", "fused_adamw", "muon"] = "adamw"
    """adamw: in one kernel on a GPU, on the host as the engine has it; fused_adamw: PyTorch's one
    kernel on any device; muon: for the matrices inside of layers, and AdamW for all else."""
    momentum: float = Field(0.95, ge=0, lt=1)
    """Of muon alone."""

    @field_validator("name", mode="before")
    @classmethod
    def _not_in_8_bits(cls, name: Any) -> Any:
        if isinstance(name, str) and "8bit" in name.replace("_", "").replace("-", ""):
            raise ValueError(
                f"{name} keeps its state in blocks of a flat shard, which a checkpoint cannot give "
                "to another number of ranks: less memory than adamw takes muon (one moment instead "
                "of two), or offload_optimizer=cpu of the engine (none on the GPU)"
            )
        return name

    @model_validator(mode="after")
    def _momentum_of_muon(self) -> "OptimizerSettings":
        if self.name != "muon" and self.momentum != 0.95:
            raise ValueError(
                f"momentum={self.momentum:g} is of muon, but name is {self.name}, which goes by "
                "train.betas; leave it out, or take muon"
            )
        return self

    def state(self) -> dict[str, Any]:
        """What the saved state of the optimizer depends on; empty for the default."""
        return {} if self.name == "adamw" else {"name": self.name}
