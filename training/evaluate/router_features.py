"""What the router sees of a sample: pooled patches of the tower, picture sizes, length of text."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from training.distributed import Ranks, gather
from training.evaluate.examples import Example, HeldOut
from training.evaluate.router import Floats, Ints
from training.generate import LoadedModel


def measure_features(
    loaded: LoadedModel, held_out: HeldOut, side: int, ranks: Ranks
) -> dict[int, Floats]:
    """Features float64 [F] of the samples that can be used; all ranks must call this.

    The tower runs once for a sample, as it does for its answer, whatever the count; `side` is any n
    that the model gives.
    """
    own: dict[int, Floats] = {}
    for sample in held_out.samples.tolist()[ranks.rank :: ranks.world_size]:
        example = held_out.read(sample)
        if example.bad is None:
            sizes = held_out.mixture.image_sizes(sample)
            pooled = _pooled(loaded, example, side)
            own[sample] = np.concatenate([pooled, _plain(example, sizes)])
    return {sample: row for part in gather(own) for sample, row in part.items()}


def identities(held_out: HeldOut, samples: Sequence[int]) -> Ints:
    """What a sample is known by in other shards, too: its key, lengths and picture sizes; [S]."""
    return np.array([_identity(held_out, sample) for sample in samples], dtype=np.int64)


def _identity(held_out: HeldOut, sample: int) -> int:
    index = held_out.index
    shard, place = index.locate(sample)
    columns = index.columns(shard)
    key = held_out.mixture.name(sample).partition(":")[2]
    lengths = int(columns.text_tokens[place]), int(columns.supervised_tokens[place])
    text = repr((key, lengths, held_out.mixture.image_sizes(sample).tolist()))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)


@torch.inference_mode()
def _pooled(loaded: LoadedModel, example: Example, side: int) -> Floats:
    """Mean and deviation over the patches of all tiles, [2 C]; zeros for text."""
    width = int(loaded.config.vision_config.hidden_size)
    if not example.num_tiles:
        return np.zeros(2 * width)
    found: list[torch.Tensor] = []

    def keep(_: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        found.append(arguments[0])

    base = loaded.model.base_model
    pixels = torch.from_numpy(np.concatenate(example.tiles))
    with base.projector.register_forward_pre_hook(keep):
        base.image_features(pixels.to(loaded.device), [side] * len(pixels))
    patches = found[0].flatten(0, 1).double()  # [tiles * patches, C]
    return torch.cat([patches.mean(dim=0), patches.std(dim=0, correction=0)]).cpu().numpy()


def _plain(example: Example, sizes: Ints) -> Floats:
    """Tiles, images, size of the mean picture, tokens of the text; logarithms, [5]."""
    width, height = sizes.mean(axis=0) if len(sizes) else (0.0, 0.0)
    text = len(example.chat.input_ids)
    return np.log1p(np.array([example.num_tiles, len(sizes), width, height, text], np.float64))
