"""Muon's direction: a matrix with its singular values brought near one."""

import torch
from torch import Tensor

STEPS = 5
_A, _B, _C = 3.4445, -4.7750, 2.0315  # Jordan et al. 2024: steepest at zero, for few steps
_MATCHED_RMS = 0.2  # of AdamW's updates (Liu et al. 2025), so that its learning rates hold


def orthogonal(matrix: Tensor) -> Tensor:
    """`matrix` [rows, columns] after five steps of Newton and Schulz, in its own precision.

    Its singular values are then between about 0.7 and 1.2; zeros stay zeros.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * (gram @ gram)) @ x
    return x.mT if tall else x


def muon_direction(momentum: Tensor, dtype: torch.dtype) -> Tensor:
    """What a learning rate is multiplied with, of the root mean square that AdamW's steps have.

    Args:
        momentum: [rows, columns].
        dtype: to compute in.
    """
    scale = _MATCHED_RMS * max(momentum.shape) ** 0.5
    return orthogonal(momentum.to(dtype)).to(momentum.dtype) * scale
