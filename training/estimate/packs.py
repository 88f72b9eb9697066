"""The packs that an estimate is made for: of the plan, or the largest that the settings allow."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from data_pipeline.plan import PackPlan
from training.config import RunConfig

IGNORED = -100


@dataclass(frozen=True)
class PackShape:
    """What of a pack decides its cost.

    lengths: tokens of each sample. sides: n of each tile. supervised: tokens with a label.
    """

    lengths: tuple[int, ...]
    sides: tuple[int, ...]
    supervised: int

    @property
    def tokens(self) -> int:
        """Of all samples."""
        return sum(self.lengths)

    @property
    def tiles(self) -> int:
        """Of all images."""
        return len(self.sides)

    @classmethod
    def of(cls, plan: PackPlan, supervised: int) -> "PackShape":
        """That of a planned pack; an empty one is a token."""
        sides = [
            int(n)
            for ns, tiles in zip(plan.sides, plan.tiles, strict=True)
            for n in np.repeat(ns, tiles)
        ]
        lengths = tuple(map(int, plan.lengths)) or (1,)
        return cls(lengths, tuple(sides), supervised)


def largest_pack(config: RunConfig, max_tokens: int, max_tiles: int | None) -> PackShape:
    """The fullest pack that settings allow: tiles of the fewest tokens, all else supervised text.

    Half of its room at least is text where nothing limits its tiles: a pack of pictures alone has
    nothing to learn from.
    """
    n = config.data.tokens.trained_sides[0]
    tiles = max_tokens // (2 * n * n)
    tiles = tiles if max_tiles is None else min(max_tiles, max_tokens // (n * n))
    lengths = _in_samples(max_tokens, config.model.llm.config.get("max_position_embeddings"))
    return PackShape(lengths, (n,) * tiles, max(1, max_tokens - tiles * n * n - len(lengths)))


def _in_samples(tokens: int, context: int | None) -> tuple[int, ...]:
    longest = min(tokens, context or tokens)
    whole, rest = divmod(tokens, longest)
    return (longest,) * whole + ((rest,) if rest else ())


def extremes(packs: Iterable[PackShape]) -> list[PackShape]:
    """Of planned packs the one of most tokens, and the one of most tiles if that is another."""
    known = list(packs)
    longest = max(known, key=lambda pack: (pack.tokens, pack.tiles))
    widest = max(known, key=lambda pack: (pack.tiles, pack.tokens))
    return [longest] if widest.tiles == longest.tiles else [longest, widest]


def covering(packs: Sequence[PackShape]) -> PackShape:
    """A pack as long as the longest and with the tiles of the widest: no less memory than any."""
    widest = max(packs, key=lambda pack: pack.tiles)
    longest = max(packs, key=lambda pack: pack.tokens)
    return PackShape(longest.lengths, widest.sides, max(pack.supervised for pack in packs))


@unset_fake_temporarily()
def fake_inputs(
    pack: PackShape, tile_size: int, image_token: int, loss_chunks: int
) -> dict[str, Any]:
    """Arguments of `PackedTokenFlex.forward` for a pack of this shape, of blank tiles.

    They are real: where the samples end and what is supervised decides shapes.
    """
    image_tokens = sum(n * n for n in pack.sides)
    ids = torch.full((1, pack.tokens), 0 if image_token else 1)
    ids[0, :image_tokens] = image_token
    labels = torch.full((1, pack.tokens), IGNORED)
    starts = np.cumsum([0, *pack.lengths])
    may = np.setdiff1d(np.arange(pack.tokens), starts[:-1])  # no sample's first token
    labels[0, may[len(may) - min(pack.supervised, len(may)) :]] = 1
    return {
        "input_ids": ids,
        "position_ids": torch.cat([torch.arange(n) for n in pack.lengths])[None],
        "pixel_values": torch.zeros(pack.tiles, 3, tile_size, tile_size, dtype=torch.uint8),
        "tile_sides": list(pack.sides),
        "cu_seqlens": torch.from_numpy(starts.astype(np.int32)),
        "max_seqlen": max(pack.lengths),
        "labels": labels,
        "loss_weights": (labels != IGNORED).float(),
        "loss_chunks": loss_chunks,
    }
