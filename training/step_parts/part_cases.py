"""Which parts a step has, and the trainer's own modules that they are."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.balance.cost import LayerStack, decoder_stack, head_weights, tower_stack
from data_pipeline.errors import InputError
from kernels.profile.baselines import Call
from training.config import RunConfig
from training.model import PackedTokenFlex
from training.model.build import DTYPES, model_config
from training.model.hub.language_model_tokenflex import decoder_and_head
from training.model.loss import Supervision, chunked_cross_entropy
from training.model.segments import PackedSegments
from training.step_parts.liger_parts import liger_loss, liger_mlp, liger_norm
from training.step_parts.step_pack import StepPack
from training.step_parts.step_part import Build, StepPart

PARTS = ("vision", "projector", "attention", "mlp", "norms", "loss")


class PartMaker:
    """Makes the parts of a run's model on one pack; InputError where it has no such part."""

    def __init__(self, config: RunConfig, pack: StepPack, dtype: str) -> None:
        full = model_config(config.model, pack.vocab_size, 0)
        with torch.device("meta"):
            self.model: Any = PackedTokenFlex._from_config(full, dtype=DTYPES[dtype])
        if full.projector_method == "pool":
            self.model.projector.backward_mode = config.train.projector_backward
            self.model.projector.impl = config.train.projector_impl
        self.full, self.pack, self.dtype, self.train = full, pack, dtype, config.train
        self.decoder: Any = decoder_and_head(self.model.language_model)[0]
        self.width = full.text_config.hidden_size

    def vision(self) -> StepPart:
        """One layer of the vision tower, on all tiles."""
        layers, trains = self._layers(self.model.vision_model), self.train.modules.vision_model
        stack = tower_stack(self.full.vision_config.to_dict())
        tiles, positions = self._tiles("vision"), self._positions
        shape = (tiles, positions, self.full.vision_config.hidden_size)
        return self._part(
            *("vision", f"a tower layer, {tiles} tiles of {positions} positions", len(layers)),
            *(layers[0], shape, lambda m, device: lambda x, w: _first(m(x, None))),
            again=trains.train and "vision_model" in self.train.recomputed,
            x_grad=trains.train,
            trains=trains.train,
            products=float(stack.weights) * tiles * positions,
            attention=4.0 * stack.width * tiles * positions**2,
        )

    def projector(self) -> StepPart:
        """The projector op, on all tiles."""
        if (method := self.full.projector_method) != "pool":
            raise InputError(
                f"--what projector: model.projector.method is {method}, and the part is the op of "
                "the method pool. Leave projector out of --what"
            )
        projector, modules, sides = self.model.projector, self.train.modules, self.pack.sides
        tiles, rows = self._tiles("projector"), sum(n * n for n in sides)
        height, width = self.full.patch_grid
        vision, inner = projector.norm_weight.shape[0], projector.w1.shape[0]
        return self._part(
            *("projector", f"{tiles} tiles to {rows} tokens", 1, projector),
            (tiles, height * width, vision),
            lambda m, device: lambda x, w: m(x, torch.tensor(sides)),
            out=(rows, self.width),
            x_grad=modules.vision_model.train,
            trains=modules.projector.train,
            norm_first=True,
            products=float(rows) * inner * (2 * vision + self.width),
        )

    def attention(self) -> StepPart:
        """Self-attention of one decoder layer, projections and positions included."""
        pack, stack = self.pack, self._stack
        rotary = getattr(self.decoder, "rotary_emb", None)
        if rotary is None:
            raise self._lacking("attention", "a decoder with rotary_emb")

        def ours(module: nn.Module, device: torch.device) -> Call:
            positions = torch.cat([torch.arange(n, device=device) for n in pack.lengths])[None]
            like = torch.empty(0, device=device, dtype=DTYPES[self.dtype])
            with torch.device(device):  # that of the model has no values
                embeddings = type(rotary)(self.decoder.config)(like, positions)
            ends = torch.tensor([0, *pack.lengths]).cumsum(0)
            segments = PackedSegments(ends, max(pack.lengths), device)
            given = {"position_embeddings": embeddings, "segments": segments}
            return lambda x, w: _first(module(hidden_states=x, attention_mask=None, **given))

        module = self._child("attention", "self_attn")
        pairs = sum(n * (n + 1) / 2 for n in pack.lengths)
        return self._decoder_part(
            *("attention", f"{len(pack.lengths)} samples, the longest {max(pack.lengths)}"),
            *(module, ours),
            products=float(stack.attention) * pack.tokens,
            attention=4.0 * stack.width * pairs,
        )

    def mlp(self) -> StepPart:
        """The MLP of one decoder layer."""
        module, stack = self._child("mlp", "mlp"), self._stack
        if any(p.ndim > 2 for p in module.parameters()):
            raise self._lacking("mlp", "dense MLPs, not a mixture of experts")
        silu = getattr(self.full.text_config, "hidden_act", None) in ("silu", "swish")
        return self._decoder_part(
            *("mlp", f"inner width {self.full.text_config.intermediate_size}", module),
            lambda m, device: lambda x, w: m(x),
            liger=liger_mlp if hasattr(module, "gate_proj") and silu else None,
            products=float(stack.weights - stack.attention) * self.pack.tokens,
        )

    def norms(self) -> StepPart:
        """One norm of the decoder's layers."""
        found = [n for layer in self._layers(self.decoder) for n in _norms(layer)]
        if not found:
            raise self._lacking("norms", "layers with norms")
        rms = type(found[0]).__name__.endswith("RMSNorm")
        return self._decoder_part(
            *("norms", type(found[0]).__name__, found[0]),
            lambda m, device: lambda x, w: m(x),
            liger=liger_norm if rms else None,
            times=len(found) + len(_norms(self.decoder)),
        )

    def loss(self) -> StepPart:
        """Logits and cross-entropy at the supervised positions, in the trainer's chunks."""
        pack, vocab = self.pack, self.full.text_config.vocab_size
        chunks = math.ceil(pack.tokens / self.train.loss_chunk_tokens)

        def supervision(device: torch.device) -> Supervision:
            places = torch.linspace(0, pack.tokens - 1, pack.supervised, device=device).long()
            targets = torch.randint(vocab, (pack.supervised,), device=device)
            return Supervision(places, targets, torch.ones(pack.supervised, device=device))

        def ours(module: nn.Module, device: torch.device) -> Call:
            given = supervision(device)
            return lambda x, w: chunked_cross_entropy(x, given, module, chunks)[0]

        head = self.model.get_output_embeddings()
        return self._part(
            "loss",
            f"{pack.supervised} supervised, vocabulary {vocab}, {chunks} chunks",
            *(1, head, (1, pack.tokens, self.width), ours),
            liger=lambda m, device: liger_loss(m, supervision(device)),
            out=(),
            trains=self.train.modules.language_model.trains_whole,
            products=float(head_weights(self.full.text_config.to_dict())) * pack.supervised,
        )

    @property
    def _stack(self) -> LayerStack:
        return decoder_stack(self.full.text_config.to_dict())

    @property
    def _positions(self) -> int:
        height, width = self.full.patch_grid
        return height * width + self.full.vision_family.leading_tokens

    def _tiles(self, name: str) -> int:
        if not self.pack.sides:
            raise InputError(
                f"--what {name}: the pack has no image ({self.pack}); use data with images or a "
                "larger data.pack.max_tokens"
            )
        return len(self.pack.sides)

    def _layers(self, of: nn.Module) -> list[nn.Module]:
        return list(next(m for m in of.modules() if isinstance(m, nn.ModuleList)))

    def _child(self, name: str, attribute: str) -> nn.Module:
        found = getattr(self._layers(self.decoder)[0], attribute, None)
        if not isinstance(found, nn.Module):
            raise self._lacking(name, f"layers with {attribute}")
        return found

    def _lacking(self, name: str, expected: str) -> InputError:
        return InputError(
            f"--what {name}: the language model, {self.full.text_config.model_type}, has no such "
            f"part; expected {expected}. Leave {name} out of --what"
        )

    def _decoder_part(
        self, name: str, about: str, module: nn.Module, ours: Build, times: int = 0, **more: Any
    ) -> StepPart:
        """times: 0 for once a layer."""
        shape = (1, self.pack.tokens, self.width)
        return self._part(
            name,
            f"{self.pack.tokens} tokens, {about}",
            times or len(self._layers(self.decoder)),
            *(module, shape, ours),
            trains=self.train.modules.language_model.trains_whole,
            again="language_model" in self.train.recomputed,
            **more,
        )

    def _part(
        self,
        name: str,
        about: str,
        times: int,
        module: nn.Module,
        x: tuple[int, ...],
        ours: Build,
        out: tuple[int, ...] | None = None,
        **more: Any,
    ) -> StepPart:
        """out: the shape of the result where it is not that of x."""
        out = x if out is None else out
        return StepPart(name, about, self.dtype, times, module, x, out, ours, **more)


def _first(result: Any) -> Tensor:
    found: Tensor = result[0] if isinstance(result, tuple) else result
    return found


def _norms(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.children() if type(m).__name__.endswith(("RMSNorm", "LayerNorm"))]
