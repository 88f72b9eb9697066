"""The token-adaptive projector as one op: the public entry point and its pooling tables."""

from kernels.reference import projector_reference as token_adaptive_projector
from kernels.tables import POOL_MODES, pooling_table

__all__ = ["POOL_MODES", "pooling_table", "token_adaptive_projector"]
