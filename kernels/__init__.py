"""The token-adaptive projector as one op: its public entry point, reference and pooling tables."""

from kernels.dispatch import implementation, triton_obstacle
from kernels.projector import jagged_projector, token_adaptive_projector
from kernels.reference import projector_reference
from kernels.tables import POOL_MODES, pooling_table

__all__ = [
    "POOL_MODES",
    "implementation",
    "jagged_projector",
    "pooling_table",
    "projector_reference",
    "token_adaptive_projector",
    "triton_obstacle",
]
