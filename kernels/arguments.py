"""What the op accepts: one ValueError that says what was found, what was expected, what to do."""

import numbers
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from kernels.tables import POOL_MODES

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_weights(x: Tensor, weights: Sequence[Tensor], pool: str) -> None:
    """Raise ValueError naming what does not fit in shapes, dtypes, devices or the pool mode.

    x: [P, C]. weights: norm_weight, norm_bias, w1, b1, w2, b2, w3, b3.
    """
    norm_weight, norm_bias, w1, b1, w2, b2, w3, b3 = weights
    check_choice("pool", pool, POOL_MODES)
    forward_mode = forward_ad._current_level >= 0  # else unpack_dual raises
    if forward_mode and any(forward_ad.unpack_dual(t).tangent is not None for t in (x, *weights)):
        raise ValueError(
            "the projector op has a backward and no forward-mode derivative (jvp): use backward() "
            "or torch.autograd.grad"
        )
    if x.ndim != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected [patches of all tiles, C]")
    if x.dtype not in DTYPES:
        raise ValueError(
            f"x is {x.dtype}; expected a floating-point dtype, bfloat16, float16, float32 or "
            "float64: cast it first"
        )
    if w1.ndim != 2 or w3.ndim != 2:
        raise ValueError(
            f"w1 has shape {tuple(w1.shape)} and w3 {tuple(w3.shape)}; expected [F, C] and [D, F]"
        )
    hidden, channels = w1.shape[0], x.shape[1]
    expected = {
        "norm_weight": (norm_weight, (channels,)),
        "norm_bias": (norm_bias, (channels,)),
        "w1": (w1, (hidden, channels)),
        "b1": (b1, (hidden,)),
        "w2": (w2, (hidden, channels)),
        "b2": (b2, (hidden,)),
        "w3": (w3, (w3.shape[0], hidden)),
        "b3": (b3, (w3.shape[0],)),
    }
    for name, (weight, shape) in expected.items():
        if weight.shape != shape:
            raise ValueError(f"{name} has shape {tuple(weight.shape)}; expected {shape}")
        wide_norm = name.startswith("norm") and weight.dtype == torch.float32
        if (weight.dtype != x.dtype and not wide_norm) or weight.device != x.device:
            raise ValueError(
                f"{name} is {weight.dtype} on {weight.device}, x is {x.dtype} on {x.device}; "
                "move and cast them to one dtype and device (a norm may stay in float32)"
            )


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; use one of {', '.join(choices)}")


def sides_tensor(tile_sides: Sequence[int] | Tensor, tiles: int) -> Tensor:
    """The sides as an integer CPU tensor [T]; ValueError unless there is one per tile.

    That each is at least 1 is checked where they are read, `kernels.tile_layout.tile_layout`.
    """
    if not isinstance(tile_sides, Tensor):
        try:
            tile_sides = list(tile_sides)
        except TypeError:
            raise ValueError(
                f"tile_sides is {tile_sides!r}; expected one whole number >= 1 per tile, in a list "
                "or an integer CPU tensor"
            ) from None
        for tile, n in enumerate(tile_sides):
            if isinstance(n, bool) or not isinstance(n, numbers.Integral):
                raise ValueError(
                    f"tile_sides[{tile}] is {n!r}; expected a whole number >= 1, "
                    "the side n of the tile's n x n tokens"
                )
        # Beyond an int64 it is too large anyhow: what says so comes with the other sides.
        bounded = [max(-1, min(int(n), 2**31)) for n in tile_sides]
        tile_sides = torch.tensor(bounded, dtype=torch.int64, device="cpu")
    if tile_sides.device.type != "cpu":
        raise ValueError(f"tile_sides is on {tile_sides.device}; pass a list or a CPU tensor")
    if tile_sides.dtype not in _INTEGERS:
        raise ValueError(
            f"tile_sides is {tile_sides.dtype}; expected whole numbers >= 1 in an integer dtype"
        )
    if tile_sides.shape != (tiles,):
        raise ValueError(
            f"tile_sides has shape {tuple(tile_sides.shape)}, {tile_sides.numel()} entries for "
            f"{tiles} tiles; pass one side per tile"
        )
    return tile_sides


def shapes_tensor(shapes: Sequence[Sequence[int]] | Tensor) -> Tensor:
    """H, W, h, w of each tile as an integer CPU tensor [T, 4]; ValueError for anything else.

    That each is at least 1 is checked where they are read, `kernels.tile_layout.tile_layout`.
    """
    expected = (
        "H, W, h, w of each tile, four whole numbers >= 1, in a list or an integer CPU tensor"
    )
    if not isinstance(shapes, Tensor):
        try:
            tiles = [tuple(shape) for shape in shapes]
        except TypeError:
            raise ValueError(f"shapes is {shapes!r}; expected {expected}") from None
        for tile, shape in enumerate(tiles):
            whole = [isinstance(n, numbers.Integral) and not isinstance(n, bool) for n in shape]
            if len(shape) != 4 or not all(whole):
                raise ValueError(f"shapes[{tile}] is {shape}; expected {expected}")
        bounded = [[max(-1, min(int(n), 2**31)) for n in shape] for shape in tiles]
        shapes = torch.tensor(bounded, dtype=torch.int64, device="cpu").reshape(-1, 4)
    fits = shapes.ndim == 2 and shapes.shape[1] == 4 and shapes.device.type == "cpu"
    if not fits or shapes.dtype not in _INTEGERS:
        raise ValueError(
            f"shapes is {shapes.dtype} {tuple(shapes.shape)} on {shapes.device}; "
            f"expected {expected}"
        )
    return shapes


def check_grid(x: Tensor, grid: tuple[int, int]) -> None:
    """Raise ValueError unless x is [T, H*W, C] of this grid (H, W)."""
    if x.ndim != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected [tiles, H*W, C]")
    try:
        height, width = grid
        whole = all(
            isinstance(n, numbers.Integral) and not isinstance(n, bool) for n in (height, width)
        )
        fits = whole and height >= 1 and width >= 1 and height * width == x.shape[1]
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError(
            f"grid {grid} does not match the {x.shape[1]} patches of x {tuple(x.shape)}; "
            "pass the (rows, columns) of patches, without class tokens"
        )
