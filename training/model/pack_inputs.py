"""From a packed batch on the host to the model's keyword arguments on the device."""

from typing import Any

import torch

from data_pipeline.loader import PackedBatch
from training.model.loss import Consistency, Supervision


def model_inputs(
    batch: PackedBatch,
    device: torch.device,
    loss_chunks: int = 1,
    consistency_weight: float | None = None,
    moved: PackedBatch | None = None,
) -> dict[str, Any]:
    """Arguments of `PackedTokenFlex.forward` for one pack (batch size 1).

    Whatever the model would have to wait for the device to find comes from the loader. cu_seqlens
    stay on the host, where attention without FlashAttention reads them. consistency_weight: of the
    students' divergences; None: there are no teachers. moved: the batch on the device, where it has
    been copied already.
    """
    cu_seqlens = batch.cu_seqlens
    batch = moved or batch.to(device)
    return {
        "input_ids": batch.input_ids[None],
        "position_ids": batch.position_ids[None],
        "pixel_values": batch.tiles,
        "tile_sides": batch.tile_sides,
        "cu_seqlens": cu_seqlens,
        "max_seqlen": batch.max_seqlen,
        "image_positions": batch.image_positions,
        "supervision": Supervision(
            batch.target_positions,
            batch.targets,
            batch.target_weights,
            _consistency(batch, consistency_weight),
        ),
        "loss_chunks": loss_chunks,
    }


def _consistency(batch: PackedBatch, weight: float | None) -> Consistency | None:
    if weight is None:
        return None
    assert batch.teachers is not None and batch.student_weights is not None
    return Consistency(batch.teachers, weight * batch.student_weights)
