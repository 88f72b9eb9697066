"""The shapes of an image at its own aspect ratio: its patches, and its tokens under a budget.

One rule, twice: both sides are scaled alike and rounded up to whole patches or tokens, by the
largest scale at which their product is within the limit. It is the rule of SigLIP 2 NaFlex (arXiv
2502.14786) as transformers has it. Rounding up keeps at least one on each side, and differs from
the exact aspect by less than one patch or token per side. All in integers: the same on every
machine.
"""

from bisect import bisect_right
from collections.abc import Callable
from functools import lru_cache

import numpy as np

# transformers finds the scale by halving 1e-6 .. 100 until less than 1e-5 is left, 24 times: these
# are the scales (_STEPS + step * (_TOP - 1)) / (_STEPS * _TOP / 100), step = 0 .. _STEPS - 1. Two
# roundings closer than that come together there, and so they do here.
_STEPS, _TOP = 1 << 24, 10**8


@lru_cache(maxsize=1 << 16)
def patch_grid(
    height: int, width: int, patch_size: int, max_patches: int, min_patches: int = 1
) -> tuple[int, int]:
    """(rows, columns) of the patches of an image of this size in pixels.

    Within the limits an image keeps its size, rounded up to whole patches. A larger one has the
    most patches up to `max_patches` that its aspect ratio allows; a smaller one is enlarged to the
    most up to `min_patches`, but no more than a hundred times. With both limits equal that is
    transformers' `get_image_size_for_max_num_patches`, in patches.

    Raises ValueError for limits out of range, and where a strip one patch wide would be longer than
    `max_patches`.
    """
    check_patches(patch_size, max_patches, min_patches)
    if height < 1 or width < 1:
        raise ValueError(f"an image of {width} x {height} pixels; both must be at least 1")
    if max(height, width) > max_patches * min(height, width):
        raise ValueError(
            f"an image of {width} x {height} pixels: at its aspect ratio {max_patches} patches "
            "leave less than one on a side; raise data.patches.max or cut the image"
        )
    own = _ceil(height, patch_size), _ceil(width, patch_size)
    if min_patches <= own[0] * own[1] <= max_patches:
        return own
    most = min_patches if own[0] * own[1] < min_patches else max_patches
    divisor = patch_size * _STEPS * (_TOP // 100)

    def at(step: int) -> tuple[int, int]:
        scale = _STEPS + step * (_TOP - 1)
        return _ceil(height * scale, divisor), _ceil(width * scale, divisor)

    return at(_last_within(at, most, _STEPS))


@lru_cache(maxsize=1 << 16)
def token_grid(rows: int, columns: int, budget: int) -> tuple[int, int]:
    """(h, w) of the tokens of rows x columns patches: h * w <= budget, never more than the patches.

    The largest t / (rows * columns) by which both sides can be scaled. A square of patches has n x
    n tokens for a budget of n^2 and for all up to the next square; 1 x 200 patches with a budget of
    64 have 1 x 64; 2 x 100 have 1 x 50, since a second row would take more than 64.

    Raises ValueError for anything below 1.
    """
    if min(rows, columns, budget) < 1:
        raise ValueError(
            f"{rows} x {columns} patches with a budget of {budget} tokens; all must be at least 1"
        )

    def at(step: int) -> tuple[int, int]:
        return _ceil(step + 1, columns), _ceil(step + 1, rows)

    return at(_last_within(at, budget, rows * columns))


def cut_patches(planes: np.ndarray, patch_size: int, out: np.ndarray | None = None) -> np.ndarray:
    """uint8 [3, rows * patch_size, columns * patch_size] -> [rows * columns, patch_size^2 * 3].

    Patches row by row, the pixels of each row by row, channels last. out: what to write into and
    return, of that very shape.
    """
    size, (height, width) = patch_size, planes.shape[1:]
    cells = planes.reshape(3, height // size, size, width // size, size).transpose(1, 3, 2, 4, 0)
    patches = np.empty((height * width // size**2, size**2 * 3), np.uint8) if out is None else out
    patches.reshape(cells.shape)[:] = cells
    return patches


def check_patches(patch_size: int, max_patches: int, min_patches: int) -> None:
    """ValueError for limits out of range."""
    if patch_size < 1:
        raise ValueError(f"patch_size is {patch_size}; give the vision tower's")
    if not 1 <= min_patches <= max_patches:
        raise ValueError(
            f"data.patches.min is {min_patches} and data.patches.max {max_patches}; both must be "
            "at least 1, and max not the smaller"
        )


def _last_within(at: Callable[[int], tuple[int, int]], limit: int, steps: int) -> int:
    """The last step of 0 .. steps - 1 with a product within the limit; step 0 counts as within."""

    def product(step: int) -> int:
        rows, columns = at(step)
        return rows * columns

    return max(0, bisect_right(range(steps), limit, key=product) - 1)


def _ceil(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)
