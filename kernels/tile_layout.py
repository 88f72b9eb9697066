"""Where each tile's patches and tokens lie: host integers, one copy to the device."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.tables import SpanTables, span_tables

MAX_ROWS = 2**31 - 1
MAX_SIDE = 1024  # a million tokens per tile
COLUMNS = 8  # of a tile in the layout's table

Shape = tuple[int, int, int, int]
"""H, W, h, w: rows and columns of a tile's patches, and of its tokens."""


@dataclass(frozen=True)
class TileLayout:
    """T tiles, one after the other: P patches [P, C] that become M tokens [M, C], both row by row.

    shapes: H, W, h, w of each tile, on the host. mode: "adaptive" or "resize".
    table: int32 [8 T + M] on the device: of each tile its first token, first patch, H, W, h, w and
        where its spans begin, down and across; then the tile of each token.
    """

    shapes: list[Shape]
    mode: str
    table: Tensor

    @property
    def rows(self) -> int:
        """M."""
        return self.table.shape[0] - COLUMNS * len(self.shapes)

    @property
    def patches(self) -> int:
        """P."""
        return sum(height * width for height, width, _, _ in self.shapes)

    @property
    def tile_of_row(self) -> Tensor:
        """int32 [M]: the tile a token belongs to."""
        return self.table[COLUMNS * len(self.shapes) :]

    @property
    def spans(self) -> SpanTables:
        """The pooling tables of all tiles."""
        return _spans(self.shapes, self.mode, self.table.device)

    @cached_property
    def grid(self) -> tuple[int, int] | str:
        """(H, W) where all tiles have the same patches, else "mixed"."""
        grids = {shape[:2] for shape in self.shapes}
        return grids.pop() if len(grids) == 1 else "mixed"


def tile_layout(
    shapes: Sequence[Shape] | npt.NDArray[np.int64], mode: str, device: torch.device
) -> TileLayout:
    """Describe a batch of these shapes, [T, 4], on `device`; the copy does not wait for the device.

    Raises ValueError for a side below 1 and for more patches or tokens than an int32 counts.
    """
    array = np.asarray(shapes, dtype=np.int64).reshape(-1, 4)
    patches, tokens = (np.prod(array[:, at : at + 2], axis=1) for at in (0, 2))
    _check_sizes(array, patches.sum(), tokens.sum())
    tiles: list[Shape] = list(map(tuple, array.tolist()))
    table = np.empty(COLUMNS * len(array) + int(tokens.sum()), dtype=np.int32)
    columns = table[: COLUMNS * len(array)].reshape(-1, COLUMNS)
    columns[:, 0], columns[:, 1] = np.cumsum(tokens) - tokens, np.cumsum(patches) - patches
    columns[:, 2:6] = array
    if tiles:
        begin = _spans(tiles, mode, device).begin
        columns[:, 6:] = [(begin[h, height], begin[w, width]) for height, width, h, w in tiles]
    table[columns.size :] = np.repeat(np.arange(len(array)), tokens)
    on_device = torch.from_numpy(table)
    if device.type == "cuda":
        on_device = on_device.pin_memory().to(device, non_blocking=True)
    return TileLayout(tiles, mode, on_device)


def square_shapes(sides: Sequence[int], grid: tuple[int, int]) -> list[Shape]:
    """The shapes of tiles of one grid (H, W), each pooled to n x n."""
    return [(*grid, n, n) for n in sides]


def _spans(shapes: list[Shape], mode: str, device: torch.device) -> SpanTables:
    pairs = {(h, height) for height, _, h, _ in shapes} | {(w, width) for _, width, _, w in shapes}
    return span_tables(tuple(sorted(pairs)), mode, device)


def _check_sizes(shapes: npt.NDArray[np.int64], patches: int, tokens: int) -> None:
    if not shapes.size:
        return
    if shapes.min() < 1:
        tile = int(shapes.min(axis=1).argmin())
        height, width, h, w = shapes[tile]
        found = f"tile_sides[{tile}] is {h}" if h == w else f"shapes[{tile}] asks for {h} x {w}"
        raise ValueError(
            f"{found}, of {height} x {width} patches; expected whole numbers >= 1, "
            "the sides of the tile's h x w tokens (n x n where one side is given)"
        )
    largest = shapes[:, 2:].max()
    if largest > MAX_SIDE or max(patches, tokens) > MAX_ROWS:
        raise ValueError(
            f"the tiles have {patches} patches and ask for {tokens} tokens, the largest side is "
            f"{largest}; expected sides up to {MAX_SIDE} and fewer than 2^31 tokens and patches: "
            "pass smaller sides or fewer tiles"
        )
