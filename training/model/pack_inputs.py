"""From a packed batch on the host to the model's keyword arguments on the device."""

from typing import Any

import torch

from data_pipeline.loader import PackedBatch


def model_inputs(batch: PackedBatch, device: torch.device, loss_chunks: int = 1) -> dict[str, Any]:
    """Arguments of `PackedTokenFlex.forward` for one pack (batch size 1).

    Labels and weights stay on the host, where the model finds the supervised positions without
    waiting for the device.
    """
    labels, loss_weights = batch.labels, batch.loss_weights
    batch = batch.to(device)
    return {
        "input_ids": batch.input_ids[None],
        "position_ids": batch.position_ids[None],
        "pixel_values": batch.tiles,
        "tile_sides": batch.tile_sides,
        "cu_seqlens": batch.cu_seqlens,
        "max_seqlen": batch.max_seqlen,
        "labels": labels[None],
        "loss_weights": loss_weights[None],
        "loss_chunks": loss_chunks,
    }
