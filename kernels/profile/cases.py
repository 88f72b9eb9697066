"""What is profiled: tiles, sides, widths, pooling mode, dtype, and how `--shape` says so."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from kernels.tables import POOL_MODES
from kernels.tile_layout import TileLayout, square_shapes, tile_layout

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHAPE_HELP = """\
A shape is a comma-separated list of KEY=VALUE without spaces; only n must be given:
  n=12           every tile becomes 12 x 12 tokens
  n=8/12/16      mixed: tiles differ in n, in equal shares, in a fixed random order
  p=.2/.3/.5     the shares of the sides, in the order of n
  T=64           tiles
  pool=adaptive  pooling mode: adaptive or resize
  grid=27x27     rows x columns of patches of a tile
  C=1152 F=3456 D=2048   channels of a patch, hidden width, width of the language model
  dtype=bf16     bf16, fp16 or fp32
For example: --shape T=64,n=12 --shape T=64,n=8/12/16,p=.2/.3/.5,pool=resize
Without --shape: 64 tiles with n = 8, 12, 16 and with the three mixed at .2/.3/.5, in both modes.
"""
SWEEP_HELP = """\
A sweep is KEY=VALUES for one key of the (first) shape: whole numbers, where a..b counts up by 1,
a,b..c goes on by the same difference, and a,b,c..d by the same factor if the three do:
  --sweep n=4..27   --sweep T=1,2,4..256   --shape T=64,n=12,pool=resize --sweep C=256,512..2048
"""
# What a sweep may go over: keys of whole numbers, and the field of `Case` each of them sets.
SWEPT = {"n": "ns", "T": "tiles", "C": "channels", "F": "hidden", "D": "width"}
_SEED = 0  # of the order of mixed sides, the same in every run


@dataclass(frozen=True)
class Case:
    """T tiles of H x W patches and C channels -> M = sum of n^2 rows; F hidden, D output.

    ns: the different sides. shares: their shares of the tiles, which sum to 1.
    """

    ns: tuple[int, ...]
    shares: tuple[float, ...]
    tiles: int = 64
    pool: str = "adaptive"
    grid: tuple[int, int] = (27, 27)
    channels: int = 1152
    hidden: int = 3456
    width: int = 2048
    dtype: str = "bf16"

    @property
    def uniform(self) -> bool:
        """Whether every tile has the same side."""
        return len(set(self.sides)) == 1

    @cached_property
    def sides(self) -> tuple[int, ...]:
        """n of each tile: exact shares (largest remainders get the tiles left over), shuffled."""
        wanted = [share * self.tiles for share in self.shares]
        counts = [math.floor(value + 1e-9) for value in wanted]
        by_remainder = sorted(range(len(wanted)), key=lambda i: counts[i] - wanted[i])
        for i in by_remainder[: self.tiles - sum(counts)]:
            counts[i] += 1
        sides = [n for n, count in zip(self.ns, counts, strict=True) for _ in range(count)]
        random.Random(_SEED).shuffle(sides)
        return tuple(sides)

    @cached_property
    def rows(self) -> int:
        """M, the tokens of all tiles."""
        return sum(n * n for n in self.sides)

    def layout(self, device: torch.device) -> TileLayout:
        """Where the tiles' patches and tokens lie."""
        return tile_layout(square_shapes(self.sides, self.grid), self.pool, device)

    @property
    def patches(self) -> int:
        """H * W."""
        return self.grid[0] * self.grid[1]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of x and the weights."""
        return DTYPES[self.dtype]

    @property
    def element_bytes(self) -> int:
        """Bytes of one element of x."""
        return self.torch_dtype.itemsize

    @classmethod
    def of(cls, record: dict[str, Any]) -> "Case":
        """The case that `asdict` made a record of, as JSON gives it back."""
        lists = ("ns", "shares", "grid")
        return cls(**record | {key: tuple(record[key]) for key in lists})

    @property
    def name(self) -> str:
        """The case as `--shape` takes it, widths only where they are not the usual ones."""
        usual = Case(self.ns, self.shares)
        parts = [f"T={self.tiles}", f"n={_joined(self.ns)}"]
        if len(self.ns) > 1:
            parts.append(f"p={_joined(tuple(f'{share:.4g}' for share in self.shares))}")
        parts.append(f"pool={self.pool}")
        if self.grid != usual.grid:
            parts.append(f"grid={self.grid[0]}x{self.grid[1]}")
        for key in ("C", "F", "D", "dtype"):
            field, _ = _READERS[key]
            if getattr(self, field) != getattr(usual, field):
                parts.append(f"{key}={getattr(self, field)}")
        return ",".join(parts)


def _joined(values: tuple[object, ...]) -> str:
    return "/".join(map(str, values))


def default_cases() -> list[Case]:
    """64 tiles: n = 8, 12, 16 and the three mixed, in both pooling modes."""
    mixed = ((8, 12, 16), (0.2, 0.3, 0.5))
    sides = [*(((n,), (1.0,)) for n in mixed[0]), mixed]
    return [Case(ns, shares, pool=pool) for pool in POOL_MODES for ns, shares in sides]


def cpu_cases() -> list[Case]:
    """One side and three mixed, small enough to be measured on a CPU."""
    widths = "T=4,C=64,F=192,D=128,grid=14x14,dtype=fp32"
    return [parse_shape(f"{widths},n={n}") for n in ("7", "4/6/8")]


def parse_sweep(text: str, base: Case) -> tuple[str, list[Case]]:
    """Read one `--sweep`: the key, and the base with each of its values; ValueError as above."""
    key, _, values = text.partition("=")
    if key not in SWEPT:
        raise ValueError(f"sweep {text!r}; expected one of {', '.join(SWEPT)}, such as n=4..27")
    known = dict(part.split("=") for part in base.name.split(","))
    if key == "n":
        known.pop("p", None)
    return key, [
        parse_shape(",".join(f"{k}={v}" for k, v in (known | {key: value}).items()))
        for value in _progression(key, values)
    ]


def _progression(key: str, text: str) -> list[int]:
    first, dots, last = text.partition("..")
    found = [_whole(key, part) for part in first.split(",")]
    if not dots:
        return found
    *_, a, b, c = [1, 1, *found]
    end, times = _whole(key, last), c // b if len(found) > 2 and b * b == a * c else 1
    step = c - b if len(found) > 1 else 1
    if end <= c or (times <= 1 and step < 1):
        raise ValueError(f"{key} is {text!r}; expected rising numbers, such as {key}=4..27")
    while (following := c * times if times > 1 else c + step) <= end:
        found.append(c := following)
    return found


def parse_shape(text: str) -> Case:
    """Read one `--shape`; ValueError says what was found, what is expected and what to do."""
    values: dict[str, str] = {}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if not equals or not value:
            raise ValueError(f"{part!r} in {text!r} is not KEY=VALUE; write for example T=64,n=12")
        if key not in _READERS:
            known = ", ".join(_READERS)
            raise ValueError(f"unknown key {key!r} in {text!r}; expected one of {known}")
        if key in values:
            raise ValueError(f"{key} is given twice in {text!r}; give it once")
        values[key] = value
    if "n" not in values:
        raise ValueError(f"no side n in {text!r}; add for example n=12, or n=8/12/16 for a mix")
    read = {}
    for key, value in values.items():
        field, reader = _READERS[key]
        read[field] = reader(key, value)
    ns = read["ns"]
    shares = read.pop("shares", (1.0,) * len(ns))
    if len(shares) != len(ns):
        raise ValueError(
            f"{len(shares)} shares in p for {len(ns)} sides in n of {text!r}; give one for each"
        )
    case = Case(shares=tuple(share / sum(shares) for share in shares), **read)
    if max(ns) > min(case.grid):
        height, width = case.grid
        raise ValueError(
            f"n is {max(ns)} in {text!r}, for a tile of {height}x{width} patches; expected "
            f"n <= {min(case.grid)}, or a larger grid="
        )
    return case


def _whole(key: str, value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"{key} is {value!r}; expected a whole number >= 1, such as {key}=64")
    return int(value)


def _sides(key: str, value: str) -> tuple[int, ...]:
    return tuple(_whole(key, part) for part in value.split("/"))


def _shares(key: str, value: str) -> tuple[float, ...]:
    try:
        shares = tuple(float(part) for part in value.split("/"))
    except ValueError:
        shares = ()
    if not shares or not all(0 < share < math.inf for share in shares):
        raise ValueError(f"{key} is {value!r}; expected positive numbers, such as p=.2/.3/.5")
    return shares


def _grid(key: str, value: str) -> tuple[int, int]:
    rows, times, columns = value.partition("x")
    if not times:
        raise ValueError(f"{key} is {value!r}; expected rows x columns, such as grid=27x27")
    return _whole(key, rows), _whole(key, columns)


def _one_of(*choices: str):
    def read(key: str, value: str) -> str:
        if value not in choices:
            raise ValueError(f"{key} is {value!r}; expected one of {', '.join(choices)}")
        return value

    return read


# Key -> the field of `Case` that it sets, and what reads its value.
_READERS: dict[str, tuple[str, Callable[[str, str], Any]]] = {
    "T": ("tiles", _whole),
    "n": ("ns", _sides),
    "p": ("shares", _shares),
    "pool": ("pool", _one_of(*POOL_MODES)),
    "grid": ("grid", _grid),
    "C": ("channels", _whole),
    "F": ("hidden", _whole),
    "D": ("width", _whole),
    "dtype": ("dtype", _one_of(*DTYPES)),
}
