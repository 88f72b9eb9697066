"""FLOPs of a pack as it was trained: its samples' lengths, its tiles and their n, what trains.

Counted are matrix products and attention, a multiply-add as 2; norms, activations, softmax,
pooling, the embedding and the optimizer are not. A product with W weights over N positions costs

    forward                2 W N
    gradient of its input  2 W N, where anything below it trains
    gradient of W          2 W N, where W trains

and so does each of an adapter's two matrices, beside one whose W does not train. Those of the
projector cost what is counted once a pack, as `extra`, and the gradients of its whole matrices.

Attention costs 4 * width for each pair of a query and a key it sees forward, twice that backward:
every sample for itself, in the language model n (n + 1) / 2 pairs of n tokens, without those before
a layer's sliding window, in the tower all.
`model` is that. `extra` is what the hardware does besides: layers, logits and gates that are
computed again for backward, attention's scores there (2 * width a pair), a blank tile.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_pipeline.balance.cost import (
    LayerStack,
    decoder_stack,
    head_weights,
    patch_weights,
    tower_stack,
)
from data_pipeline.tokenizer import Tokenizer
from training.config import RunConfig, TrainSettings
from training.flops.adapter_cost import adapter_costs
from training.flops.method_flops import gate_flops, method_work
from training.model.build import model_config
from training.model.hub import TokenFlexConfig


@dataclass(frozen=True)
class PartFlops:
    """FLOPs of a part of the model: what the model needs, and what is computed besides."""

    model: float = 0.0
    extra: float = 0.0

    @property
    def hardware(self) -> float:
        """All that is computed."""
        return self.model + self.extra

    def __add__(self, other: "PartFlops") -> "PartFlops":
        return PartFlops(self.model + other.model, self.extra + other.extra)


class PackCost:
    """Counts packs, forward and backward.

    Args:
        config: of the model, the vocabulary as large as it is trained.
        train: what trains, and what is computed again.
        loss_chunks: slices of the logits.
        masked: count the pairs, too, that a causal mask hides, as `torch.utils.flop_counter` does.
        consistency: the logits of teachers are computed beside the others.
    """

    def __init__(
        self,
        config: TokenFlexConfig,
        train: TrainSettings,
        loss_chunks: int,
        masked: bool = False,
        consistency: bool = False,
    ) -> None:
        vision, llm = config.vision_config.to_dict(), config.text_config.to_dict()
        self._tower, self._patch = tower_stack(vision), patch_weights(vision)
        self._decoder, self._head = decoder_stack(llm), head_weights(llm)
        height, width = config.patch_grid
        self._patches = height * width
        self._positions = self._patches + config.vision_family.leading_tokens
        self._config = config
        self._train, self._chunks, self._masked = train, loss_chunks, masked
        self._consistency = consistency
        self._adapters = adapter_costs(config, train.adapters)

    @classmethod
    def of(cls, config: RunConfig, tokenizer: Tokenizer, loss_chunks: int) -> "PackCost":
        """That of a run's model, with its tokenizer's vocabulary."""
        image_token = tokenizer.special_id("<IMG_CONTEXT>")
        full = model_config(config.model, tokenizer.vocab_size, image_token)
        consistency = config.consistency_weight is not None
        return cls(full, config.train, loss_chunks, consistency=consistency)

    def pack(
        self, lengths: npt.ArrayLike, tile_sides: Sequence[int], supervised: int
    ) -> dict[str, PartFlops]:
        """FLOPs by part: "vision", "projector", "decoder", "loss".

        Args:
            lengths: [S], tokens of each sample.
            tile_sides: n of each tile; without any, the model runs a blank one.
            supervised: tokens with a label.
        """
        sides = list(tile_sides) or [self._config.smallest_side]
        vision = self._vision(len(sides))
        projector = self._projector(sides)
        if not tile_sides:
            vision, projector = (PartFlops(0.0, part.hardware) for part in (vision, projector))
        return {
            "vision": vision,
            "projector": projector,
            "decoder": self._layers(np.asarray(lengths, dtype=np.float64)),
            "loss": self._loss(supervised),
        }

    def _vision(self, tiles: int) -> PartFlops:
        trains = self._train.modules.vision_model.train
        patches = (
            2.0 * self._patch * self._patches * tiles * (1 + trains)
        )  # pixels have no gradient
        positions = float(self._positions)
        backward = trains or bool(self._adapters["vision_model"].weights)
        return PartFlops(patches) + self._stack(
            self._tower, positions * tiles, positions**2 * tiles, backward, trains, "vision_model"
        )

    def _layers(self, lengths: npt.NDArray[np.float64]) -> PartFlops:
        stack = self._decoder
        pairs = float((lengths * lengths).sum()) if self._masked else stack.causal_pairs(lengths)
        trains = self._train.modules.language_model.trains_whole
        size = float(lengths.sum()), pairs
        return self._stack(stack, *size, True, trains, "language_model")

    def _stack(
        self,
        stack: LayerStack,
        positions: float,
        pairs: float,
        backward: bool,
        trains: bool,
        module: str,
    ) -> PartFlops:
        """All layers of a module; `backward`: whether gradients pass through."""
        product = 2.0 * stack.weights * positions
        attention = 4.0 * stack.width * pairs
        model = product * (1 + backward + trains) + attention * (1 + 2 * backward)
        extra = 2.0 * stack.width * pairs * backward
        adapters, again = self._adapters[module], 0.0
        small = 2.0 * adapters.weights * positions
        if backward and module in self._train.recomputed:
            # It ends where all that was dropped is there again: before a layer's last product.
            extra += product - 2.0 * stack.last * positions * (not adapters.last) + attention
            again = small - 2.0 * adapters.last * positions
        beside = PartFlops(3 * small, again + adapters.fixed)
        return PartFlops(stack.layers * model, stack.layers * extra) + beside

    def _projector(self, sides: Sequence[int]) -> PartFlops:
        modules, adapters = self._train.modules, self._adapters["projector"]
        below = modules.vision_model.train or self._adapters["vision_model"].weights > 0
        work, gates = method_work(self._config, sides), gate_flops(self._config, sides)
        model, again = work.flops(below, modules.projector.train)
        if adapters.fixed:  # beside the frozen matrices of `pool`
            out = work.flops(False, False)[0] - gates
            model += gates * adapters.gates + out * (1 - below + adapters.out)
        backward = below or modules.projector.train or adapters.fixed
        if self._train.projector_backward == "recompute" and backward:
            again += gates
        return PartFlops(model, again + adapters.fixed)

    def _loss(self, supervised: int) -> PartFlops:
        product = 2.0 * self._head * supervised
        trains = self._train.modules.language_model.trains_whole  # rows of new tokens are few
        again = self._chunks > 1
        return PartFlops(
            product * (2 + trains), product * (again + self._consistency * (1 + again))
        )
