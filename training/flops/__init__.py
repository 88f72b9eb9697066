"""FLOPs of packs and steps, and what part of the GPUs' peak they are."""

from training.flops.pack_flops import PackCost, PartFlops
from training.flops.utilisation import peak_flops

__all__ = ["PackCost", "PartFlops", "peak_flops"]
