"""A pack's samples as rows of one length, which is how a model without packing takes them."""

from typing import Any

import torch

from data_pipeline.batch import IGNORE, PackedBatch


def padded_rows(batch: PackedBatch, pad_id: int) -> dict[str, Any]:
    """Arguments of the model's forward: S rows of the longest sample's length L.

    input_ids, labels, attention_mask: int64 [S, L]; padding is at the end, without labels. tiles
    keep their order, which is that of the rows.
    """
    lengths = batch.cu_seqlens.diff().tolist()
    shape = len(lengths), max(lengths)
    rows: dict[str, Any] = {
        "input_ids": torch.full(shape, pad_id),
        "labels": torch.full(shape, IGNORE),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
    }
    for row, (ids, labels) in enumerate(
        zip(batch.input_ids.split(lengths), batch.labels.split(lengths), strict=True)
    ):
        rows["input_ids"][row, : len(ids)] = ids
        rows["labels"][row, : len(ids)] = labels
        rows["attention_mask"][row, : len(ids)] = 1
    if batch.tile_sides:
        rows |= {"pixel_values": batch.tiles, "tile_sides": torch.tensor(batch.tile_sides)}
    return rows
