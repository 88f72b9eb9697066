"""What a sample costs to train on, in FLOPs of the language model and the vision tower."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.backbone_config import tile_side
from data_pipeline.errors import InputError

# Language models of transformers whose MLP has two matrices; that of all others is gated: three.
_PLAIN_MLP = {"falcon", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "opt", "phi"}
_PLAIN_MLP |= {"bloom", "mpt", "starcoder2"}


@dataclass(frozen=True)
class CostModel:
    """FLOPs of a forward and a backward pass over samples in packs.

    A matrix product costs 2 FLOPs per weight and token forward and twice that backward: 6 N T.
    Attention adds, per layer, 12 * width * T^2; half of that where it is causal, and less what lies
    before a sliding window. Attention never leaves a sample in its pack, so a pack costs the sum of
    its samples.

    Attributes:
        llm_parameters, vision_parameters: weights in matrix products, the output head included,
            the embedding of tokens not.
        llm_layers, vision_layers: attention layers.
        llm_width, vision_width: attention heads * their size.
        patches_per_tile: positions of the vision tower per tile.
        llm_windowed_layers, llm_window: those of llm_layers with a sliding window, and its tokens.
    """

    llm_parameters: int
    llm_layers: int
    llm_width: int
    vision_parameters: int
    vision_layers: int
    vision_width: int
    patches_per_tile: int
    llm_windowed_layers: int = 0
    llm_window: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise InputError(
                    f"{field.name} of a cost model must be a whole number from 0 on, found "
                    f"{value!r}"
                )

    @property
    def flops_per_tile(self) -> float:
        patches = float(self.patches_per_tile)
        attention = 12.0 * self.vision_layers * self.vision_width * patches**2
        return 6.0 * self.vision_parameters * patches + attention

    def flops(self, tokens: npt.ArrayLike, tiles: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """FLOPs of each sample.

        Args:
            tokens, tiles: [S], length in the language model, and image tiles.

        Returns:
            float64 [S].
        """
        length = np.asarray(tokens, dtype=np.float64)
        count = np.asarray(tiles, dtype=np.float64)
        attention = 6.0 * self.llm_layers * self.llm_width * length * length
        if self.llm_windowed_layers:
            before = np.maximum(length - self.llm_window, 0.0)
            attention -= 6.0 * self.llm_windowed_layers * self.llm_width * before * before
        return 6.0 * self.llm_parameters * length + attention + count * self.flops_per_tile

    @classmethod
    def from_configs(cls, vision: Mapping[str, Any], llm: Mapping[str, Any]) -> "CostModel":
        """The cost model of a vision tower and a language model.

        Args:
            vision: the `config.json` of a vision transformer of any family in transformers:
                hidden_size, intermediate_size or mlp_ratio, num_hidden_layers, image_size (or
                num_patches), patch_size. A class token is left out, one position beside hundreds
                of patches.
            llm: a decoder's: hidden_size, intermediate_size, num_hidden_layers,
                num_attention_heads, vocab_size; num_key_value_heads, head_dim, sliding_window and
                layer_types where it has them; of a mixture of experts those that a token uses
                count, and the router.

        Raises:
            InputError: a key is missing, or is not a whole number above 0.
        """
        decoder, tower = decoder_stack(llm), tower_stack(vision)
        image = tile_side(vision) or _whole(vision, "vision", "image_size")
        side = image // _whole(vision, "vision", "patch_size")
        return cls(
            llm_parameters=decoder.layers * decoder.weights + head_weights(llm),
            llm_layers=decoder.layers,
            llm_width=decoder.width,
            vision_parameters=tower.layers * tower.weights + patch_weights(vision),
            vision_layers=tower.layers,
            vision_width=tower.width,
            patches_per_tile=side**2,
            llm_windowed_layers=decoder.windowed,
            llm_window=decoder.window,
        )


DEFAULT_COST = CostModel(
    llm_parameters=1_700_000_000,
    llm_layers=28,
    llm_width=2048,
    vision_parameters=400_000_000,
    vision_layers=27,
    vision_width=1152,
    patches_per_tile=1024,
)
"""A language model of 1.7 B and a vision tower of 0.4 B parameters, 32 x 32 patches per tile."""


@dataclass(frozen=True)
class LayerStack:
    """The layers of a transformer, and what a position passes in each.

    layers: how many. weights: in one layer's matrix products; of them `attention` in those around
    attention, `last` in the one that ends the layer. width: attention heads * their size.
    windowed, window: layers with a sliding window, and its tokens.
    """

    layers: int
    weights: int
    attention: int
    last: int
    width: int
    windowed: int = 0
    window: int = 0

    def causal_pairs(self, lengths: npt.NDArray[np.float64]) -> float:
        """Pairs of a query and a key it sees, of all samples, in a layer on the average."""
        pairs = float((lengths * (lengths + 1) / 2).sum())
        if self.windowed:
            before = np.maximum(lengths - self.window, 0.0)
            pairs -= float((before * (before + 1) / 2).sum()) * self.windowed / self.layers
        return pairs


def tower_stack(vision: Mapping[str, Any]) -> LayerStack:
    """The layers of a vision tower; see `CostModel.from_configs`."""
    width = _whole(vision, "vision", "hidden_size")
    inner = int(width * vision.get("mlp_ratio", 0))  # what some families give instead
    if not inner or "intermediate_size" in vision:
        inner = _whole(vision, "vision", "intermediate_size")
    attention = 4 * width**2
    weights = attention + 2 * width * inner
    return LayerStack(_layers(vision, "vision"), weights, attention, width * inner, width)


def patch_weights(vision: Mapping[str, Any]) -> int:
    """Weights of the product that makes a position of a patch."""
    channels, patch = int(vision.get("num_channels") or 3), _whole(vision, "vision", "patch_size")
    return channels * patch**2 * _whole(vision, "vision", "hidden_size")


def decoder_stack(llm: Mapping[str, Any]) -> LayerStack:
    """The layers of a language model; see `CostModel.from_configs`."""
    width, heads = _whole(llm, "llm", "hidden_size"), _whole(llm, "llm", "num_attention_heads")
    key_value_heads = int(llm.get("num_key_value_heads") or heads)
    attention = 2 * width * _head_size(llm) * (heads + key_value_heads)
    matrices = 2 if llm.get("model_type") in _PLAIN_MLP else 3
    experts = llm.get("num_experts_per_tok")
    inner = experts and llm.get("moe_intermediate_size")
    last = width * int(inner or _whole(llm, "llm", "intermediate_size")) * int(experts or 1)
    weights = attention + matrices * last
    if experts:  # the router
        weights += width * int(llm.get("num_experts") or llm.get("num_local_experts") or 0)
    layers, windows = _layers(llm, "llm"), windowed_layers(llm)
    return LayerStack(layers, weights, attention, last, heads * _head_size(llm), *windows)


def windowed_layers(llm: Mapping[str, Any]) -> tuple[int, int]:
    """How many layers of a decoder have a sliding window, and its tokens; 0, 0 without."""
    window, kinds = llm.get("sliding_window"), llm.get("layer_types")
    if not window or llm.get("use_sliding_window") is False:
        return 0, 0
    count = _layers(llm, "llm") if kinds is None else list(kinds).count("sliding_attention")
    return (count, int(window)) if count else (0, 0)


def head_weights(llm: Mapping[str, Any]) -> int:
    """Weights of the product that gives the logits of a position."""
    return _whole(llm, "llm", "hidden_size") * _whole(llm, "llm", "vocab_size")


def _layers(config: Mapping[str, Any], name: str) -> int:
    return _whole(config, name, "num_hidden_layers")


def _head_size(llm: Mapping[str, Any]) -> int:
    heads = _whole(llm, "llm", "num_attention_heads")
    return int(llm.get("head_dim") or _whole(llm, "llm", "hidden_size") // heads)


def _whole(config: Mapping[str, Any], name: str, key: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(
            f"{key} of the {name} config must be a whole number above 0, found {value!r}; give the "
            "config.json of a transformers model"
        )
    return value
