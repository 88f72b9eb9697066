"""What the kernels over rows of C channels share: how a row is cut into blocks.

Triton's blocks are powers of two and C often is not (1152 of SigLIP so400m): a row is one block of
the largest power of two below C and one for the rest, 1024 + 128, where a single block of 2048
would leave 44 % of its lanes idle.
"""

import triton
import triton.language as tl
from torch import Tensor


def row_blocks(channels: int) -> dict[str, int]:
    """The constexpr arguments C, BLOCK and TAIL (0 where C is a power of two)."""
    block = 1 << (channels.bit_length() - 1)
    rest = channels - block
    return {"C": channels, "BLOCK": block, "TAIL": triton.next_power_of_2(rest) if rest else 0}


@triton.jit
def row_statistics(main, tail, tail_mask, eps: tl.constexpr, C: tl.constexpr, TAIL: tl.constexpr):
    """Mean and reciprocal standard deviation of a row, two passes over its registers."""
    total = tl.sum(main, axis=0)
    if TAIL > 0:
        total += tl.sum(tail, axis=0)
    mean = total / C
    deviation = main - mean
    squares = tl.sum(deviation * deviation, axis=0)
    if TAIL > 0:
        deviation = tl.where(tail_mask, tail - mean, 0.0)
        squares += tl.sum(deviation * deviation, axis=0)
    rstd = 1.0 / tl.sqrt(squares / C + eps)
    return mean, rstd


@triton.jit
def load_row(base, START: tl.constexpr, SIZE: tl.constexpr, C: tl.constexpr):
    """Channels START .. START + SIZE of a row in float32, zeros beyond C."""
    channels = START + tl.arange(0, SIZE)
    return tl.load(base + channels, mask=channels < C, other=0.0).to(tl.float32)


@triton.jit
def store_row(base, values, START: tl.constexpr, SIZE: tl.constexpr, C: tl.constexpr):
    """Round `values` to the row's dtype and write those channels that exist."""
    channels = START + tl.arange(0, SIZE)
    tl.store(base + channels, values.to(base.dtype.element_ty), mask=channels < C)


def contiguous(*tensors: Tensor) -> list[Tensor]:
    """The kernels address rows by C alone."""
    return [tensor.contiguous() for tensor in tensors]
