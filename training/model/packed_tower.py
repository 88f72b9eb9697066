"""A vision tower over the images of a pack: one row of patches, attention ends at their borders."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from training.model.hub.vision_siglip2_tokenflex import NativeFamily
from training.model.segments import PackedSegments


def packed_patches(
    family: NativeFamily,
    tower: PreTrainedModel,
    pixels: Tensor,
    grids: Sequence[tuple[int, int]],
) -> Tensor:
    """As `NativeFamily.native_patches`, every layer called once, whatever the grids.

    Under ZeRO-3 all ranks so call the same modules; the attention must be `ATTENTION_NAME`.
    """
    lengths = torch.tensor([0, *(height * width for height, width in grids)])
    ends = lengths.cumsum(0).to(torch.int32)
    images = PackedSegments(ends, int(lengths.max()), pixels.device, causal=False)
    embedded = family.embed(tower, pixels[None], grids)
    # transformers' layers of this tower hand nothing on to their attention but a mask.
    return family.encode(tower, embedded, images)[0]
