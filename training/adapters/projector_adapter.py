"""Adapters of the projector's matrices, which are no layers: PEFT has none for them."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from training.adapters.adapter_settings import ProjectorAdapterSettings


class MatrixAdapter(nn.Module):
    """Adds scale * B A to one of the projector's matrices [out, in]; a module of its own.

    Under ZeRO-3 its two parameters are gathered while it runs, as those of any module.
    """

    def __init__(self, matrix: nn.Parameter, rows: int, columns: int, r: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        small = nn.init.kaiming_uniform_(torch.empty(r, columns), a=math.sqrt(5))  # as PEFT does
        self.lora_A = nn.Parameter(small.to(matrix.device, matrix.dtype))
        self.lora_B = nn.Parameter(small.new_zeros(rows, r).to(self.lora_A))

    def forward(self, matrix: Tensor) -> Tensor:
        """The matrix with the adapter in it."""
        return torch.addmm(matrix, self.lora_B, self.lora_A, alpha=self.scale)


def adapt_projector(projector: Any, settings: ProjectorAdapterSettings) -> None:
    """Put an adapter beside each matrix that the settings name.

    projector: with an `adapters` that its forward looks into, and its widths.
    """
    vision, hidden, text = projector.widths
    shapes = {"w1": (hidden, vision), "w2": (hidden, vision), "w3": (text, hidden)}
    for name in settings.matrices:
        matrix: nn.Parameter = getattr(projector, name)
        projector.adapters[name] = MatrixAdapter(matrix, *shapes[name], settings.r, settings.scale)
