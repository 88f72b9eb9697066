"""How samples become packs, and packs become steps."""

from pydantic import Field

from data_pipeline.config_file import Settings


class PackSettings(Settings):
    """How samples become packs, and packs become steps."""

    max_tokens: int = Field(8192, gt=0)
    """Tokens a pack can hold."""
    max_tiles: int | None = Field(None, gt=0)
    """Image tiles a pack can hold, to bound the vision tower's memory; null: no limit."""
    packs_per_step: int = Field(gt=0)
    """Packs of one optimizer step, over all ranks; the world size must divide it."""
    window_samples: int = Field(20_000, gt=0)
    """Samples that are packed and balanced together; at most one pass over the data."""
