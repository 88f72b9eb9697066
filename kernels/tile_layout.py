"""Where each tile's tokens lie in the packed rows: host integers, one copy to the device."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MAX_ROWS = 2**31 - 1
MAX_SIDE = 1024  # a million tokens per tile; the pooling tables hold every side up to the largest


@dataclass(frozen=True)
class TileLayout:
    """T tiles of n^2 tokens each, packed one after the other into M = `rows` rows.

    sides: n of each tile, on the host. table: int32 [2 T + M] on the device: first row of each
    tile, n of each tile, tile of each row.
    """

    sides: list[int]
    rows: int
    table: Tensor

    @property
    def first_rows(self) -> Tensor:
        """int32 [T]: where each tile's rows start."""
        return self.table[: len(self.sides)]

    @property
    def tile_sides(self) -> Tensor:
        """int32 [T]: n of each tile."""
        return self.table[len(self.sides) : 2 * len(self.sides)]

    @property
    def tile_of_row(self) -> Tensor:
        """int32 [M]: the tile a row belongs to."""
        return self.table[2 * len(self.sides) :]


def tile_layout(sides: Sequence[int] | np.ndarray, device: torch.device) -> TileLayout:
    """Describe a batch with these sides on `device`; the copy does not wait for the device.

    Raises ValueError for a side below 1 and for more rows than an int32 counts.
    """
    array = np.asarray(sides, dtype=np.int64)
    if array.size and array.min() < 1:
        tile = int(array.argmin())
        raise ValueError(
            f"tile_sides[{tile}] is {array[tile]}; expected a whole number >= 1, "
            "the side n of the tile's n x n tokens"
        )
    counts = array * array
    rows = int(counts.sum())
    if array.size and (array.max() > MAX_SIDE or rows > MAX_ROWS):
        raise ValueError(
            f"tile_sides ask for {rows} tokens, the largest side is {array.max()}; expected sides "
            f"up to {MAX_SIDE} and fewer than 2^31 tokens: pass smaller sides or fewer tiles"
        )
    parts = [np.cumsum(counts) - counts, array, np.repeat(np.arange(array.size), counts)]
    table = torch.from_numpy(np.concatenate(parts).astype(np.int32))
    if device.type == "cuda":
        table = table.pin_memory().to(device, non_blocking=True)
    return TileLayout(array.tolist(), rows, table)
