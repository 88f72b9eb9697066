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
_DIGIT = (1 << 16) - 1
_DIGITS = np.array([1 << 48, 1 << 32, 1 << 16, 1])

Shape = tuple[int, int, int, int]
"""H, W, h, w: rows and columns of a tile's patches, and of its tokens."""


@dataclass(frozen=True)
class TileLayout:
    """T tiles, one after the other: P patches [P, C] that become M tokens [M, C], both row by row.

    shapes: int64 [T, 4], the H, W, h, w of each tile, on the host. mode: "adaptive" or "resize".
    table: int32 [8 T + M] on the device: of each tile its first token, first patch, H, W, h, w and
        where its spans begin, down and across; then the tile of each token.
    kinds: of `shape_kinds`.
    """

    shapes: npt.NDArray[np.int64]
    mode: str
    table: Tensor
    kinds: tuple[list[Shape], npt.NDArray[np.intp]]

    @property
    def rows(self) -> int:
        """M."""
        return self.table.shape[0] - COLUMNS * len(self.shapes)

    @cached_property
    def patches(self) -> int:
        """P."""
        return int((self.shapes[:, 0] * self.shapes[:, 1]).sum())

    @property
    def tile_of_row(self) -> Tensor:
        """int32 [M]: the tile a token belongs to."""
        return self.table[COLUMNS * len(self.shapes) :]

    @property
    def spans(self) -> SpanTables:
        """The pooling tables of all tiles."""
        return _spans(self.kinds[0], self.mode, self.table.device)

    @property
    def grid(self) -> tuple[int, int] | str:
        """(H, W) where all tiles have the same patches, else "mixed"."""
        grids = {shape[:2] for shape in self.kinds[0]}
        return grids.pop() if len(grids) == 1 else "mixed"

    def groups(self) -> dict[Shape, npt.NDArray[np.int64]]:
        """Shape -> the tiles of that shape, in their order."""
        kinds, kind_of_tile = self.kinds
        return {shape: np.flatnonzero(kind_of_tile == kind) for kind, shape in enumerate(kinds)}


def tile_layout(
    shapes: Sequence[Shape] | npt.NDArray[np.int64], mode: str, device: torch.device
) -> TileLayout:
    """Describe a batch of these shapes, [T, 4], on `device`; the copy does not wait for the device.

    Raises ValueError for a side below 1 and for more patches or tokens than an int32 counts.
    """
    array = np.asarray(shapes, dtype=np.int64).reshape(-1, 4)
    patches, tokens = array[:, 0] * array[:, 1], array[:, 2] * array[:, 3]
    _check_sizes(array, patches, tokens)
    kinds, kind_of_tile = shape_kinds(array)
    table = np.empty(COLUMNS * len(array) + int(tokens.sum()), dtype=np.int32)
    columns = table[: COLUMNS * len(array)].reshape(-1, COLUMNS)
    columns[:, 0], columns[:, 1] = tokens.cumsum() - tokens, patches.cumsum() - patches
    columns[:, 2:6] = array
    if kinds:
        begin = _spans(kinds, mode, device).begin
        begins = [(begin[h, height], begin[w, width]) for height, width, h, w in kinds]
        columns[:, 6:] = np.asarray(begins)[kind_of_tile]
    table[columns.size :] = np.arange(len(array)).repeat(tokens)
    on_device = torch.from_numpy(table)
    if device.type == "cuda":
        on_device = on_device.pin_memory().to(device, non_blocking=True)
    return TileLayout(array, mode, on_device, (kinds, kind_of_tile))


def square_shapes(sides: Sequence[int], grid: tuple[int, int]) -> list[Shape]:
    """The shapes of tiles of one grid (H, W), each pooled to n x n."""
    return [(*grid, n, n) for n in sides]


def shape_kinds(shapes: npt.NDArray[np.int64]) -> tuple[list[Shape], npt.NDArray[np.intp]]:
    """The different shapes, and which of them each tile has: intp [T]."""
    codes = shapes @ _DIGITS
    found = sorted(set(codes.tolist()))  # faster than np.unique, for few
    kinds = [(c >> 48, c >> 32 & _DIGIT, c >> 16 & _DIGIT, c & _DIGIT) for c in found]
    return kinds, np.searchsorted(found, codes)


def _spans(kinds: list[Shape], mode: str, device: torch.device) -> SpanTables:
    pairs = {(h, height) for height, _, h, _ in kinds} | {(w, width) for _, width, _, w in kinds}
    return span_tables(tuple(sorted(pairs)), mode, device)


def _check_sizes(
    shapes: npt.NDArray[np.int64], patches: npt.NDArray[np.int64], tokens: npt.NDArray[np.int64]
) -> None:
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
    largest = shapes.max()
    if largest > MAX_SIDE or max(patches.sum(), tokens.sum()) > MAX_ROWS:
        raise ValueError(
            f"the tiles have {patches.sum()} patches and ask for {tokens.sum()} tokens, the "
            f"largest side is {largest}; expected sides up to {MAX_SIDE} and fewer than 2^31 "
            "tokens and patches: pass smaller sides or fewer tiles"
        )
