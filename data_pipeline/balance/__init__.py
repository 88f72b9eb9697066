"""Joint packing and balancing of samples over the packs of several steps, by a cost model."""

from data_pipeline.balance.cost import DEFAULT_COST, CostModel
from data_pipeline.balance.packing import Packing, balance

__all__ = ["DEFAULT_COST", "CostModel", "Packing", "balance"]
