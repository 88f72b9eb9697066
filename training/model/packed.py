"""The trainer's model: the one that users load, with packed rows and a loss in chunks.

B rows (1 when packed), L tokens, S samples, T tiles, D language width, V vocabulary,
K supervised positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.utils import ModelOutput

from data_pipeline.errors import InputError
from training.model.attention import ATTENTION_NAME
from training.model.consistency import chunked_consistency
from training.model.hub import TokenFlexConfig, TokenFlexGenerationMixin, TokenFlexModel
from training.model.hub.generation_tokenflex import find_cache
from training.model.hub.language_model_tokenflex import (
    decoder_and_head,
    final_logits,
    trainer_names,
)
from training.model.language_models import (
    check_isolation,
    check_layers,
    check_logits,
    check_modules,
)
from training.model.loss import Supervision, chunked_cross_entropy, find_supervision
from training.model.native_images import Shapes, native_features
from training.model.packed_projector import TRAINED_METHODS
from training.model.segments import PackedSegments, find_segments
from training.profiling.step_phases import phase


@dataclass
class TokenFlexOutput(ModelOutput):
    """What a forward returns.

    loss: float32 scalar, the sum of weight * cross-entropy, not normalised.
    token_losses: float32 [K], detached. predictions: int64 [K], the most likely ids. Both in order
        of the supervised positions, as are divergences, float32 [K], detached, where the loss has
        them: see `chunked_consistency`. num_supervised: K.
    logits: [B, L, V], only without labels.
    """

    loss: Tensor | None = None
    token_losses: Tensor | None = None
    predictions: Tensor | None = None
    logits: Tensor | None = None
    num_supervised: int | None = None
    divergences: Tensor | None = None


class PackedTokenFlex(TokenFlexModel, TokenFlexGenerationMixin):
    """The same parameters, trained: the projector op, packed attention, the chunked loss.

    Its language model has its head on it: the parameters' names are those of the checkpoints of
    all versions, and `trainer_names` says which those of an exported folder are.
    Anything that is neither a pack nor supervised runs as in the class that users load.
    """

    _auto_class = None  # what this saves needs no code of ours beside it
    _keys_to_ignore_on_load_unexpected = None
    _no_split_modules = [method.__name__ for method in TRAINED_METHODS.values()]  # noqa: RUF012
    _token_methods = TRAINED_METHODS

    def __init__(self, config: TokenFlexConfig) -> None:
        try:
            config.check_image_token()
        except ValueError as error:
            raise InputError(str(error)) from error
        check_logits(config.text_config)
        check_layers(config.text_config)
        if config._attn_implementation is None:
            config._attn_implementation = ATTENTION_NAME
        super().__init__(config)
        self._write_no_image_tokens()

    def _language_model_and_head(
        self, causal: PreTrainedModel
    ) -> tuple[PreTrainedModel, nn.Module]:
        check_modules(causal)
        try:
            return causal, decoder_and_head(causal)[1]
        except ValueError as error:
            raise InputError(str(error)) from error

    @classmethod
    def from_pretrained(
        cls, *args: Any, key_mapping: dict[str, str] | None = None, **kwargs: Any
    ) -> Any:
        """As in `PreTrainedModel`, from an exported folder of any version."""
        config = kwargs.get("config") or TokenFlexConfig.from_pretrained(args[0])
        names = trainer_names(config.text_config) if key_mapping is None else key_mapping
        return super().from_pretrained(*args, key_mapping=names, **kwargs)

    def get_output_embeddings(self) -> nn.Module:
        """The language model's head."""
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's head."""
        self.language_model.set_output_embeddings(value)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        tile_sides: Sequence[int] | Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        loss_weights: Tensor | None = None,
        image_positions: Tensor | None = None,
        supervision: Supervision | None = None,
        loss_chunks: int = 1,
        image_shapes: Shapes | None = None,
        **kwargs: Any,
    ) -> TokenFlexOutput | CausalLMOutputWithPast:
        """Loss of a pack or of rows; without labels the logits of a pack.

        Arguments that are not named here, and rows with neither labels nor cu_seqlens nor positions
        that restart: as in `TokenFlexModel`, with logits.

        input_ids: int64 [B, L]; one <IMG_CONTEXT> per vision token.
        tile_sides: n of each tile, on the host. image_shapes: instead, where pixel_values are those
            of images of any shape; see `native_features`.
        position_ids: int64 [B, L], restarting at 0 per sample.
        cu_seqlens: int32 [S + 1], for packs (B = 1); when None, found from position_ids that
            restart. max_seqlen: the longest sample, on the host.
        labels: int64 [B, L], not shifted, -100 ignored, a sample's first token never supervised.
            Left on the host they save a wait for the device. loss_weights: float32 [B, L].
        supervision: what they come to, known beforehand.
        image_positions: int64 [sum of n^2], the <IMG_CONTEXT> tokens of the flattened [B * L]; when
            None, found from input_ids, which waits for the device.
        loss_chunks: see `chunked_cross_entropy`.
        attention_mask: [B, L], 1 for real tokens: for padded rows.

        Raises InputError (a ValueError) when image tokens, tiles and sides disagree.
        """
        # First what may wait for the device, before this forward has queued any work there.
        if supervision is None and labels is not None and input_ids is not None:
            supervision = find_supervision(labels, loss_weights, input_ids.device)
        row = input_ids if attention_mask is None and find_cache(kwargs) is None else None
        segments = find_segments(row, position_ids, cu_seqlens, max_seqlen)
        if input_ids is None or (supervision is None and segments is None):
            if image_shapes is not None:
                raise InputError("image_shapes came without a pack or labels; give one of them")
            return super().forward(
                input_ids,
                pixel_values,
                tile_sides,
                attention_mask,
                position_ids,
                inputs_embeds,
                mm_encoder_outputs,
                labels=labels,
                logits_to_keep=logits_to_keep,
                **kwargs,
            )
        if image_positions is None:
            is_image = torch.eq(input_ids, self.config.image_token_id)
            image_positions = is_image.flatten().nonzero().flatten()
        with phase("insert"):
            images = (pixel_values, tile_sides, image_shapes)
            embeds = self._insert_images(input_ids, image_positions, *images)
        with phase("decoder"):
            hidden = self._decode(embeds, position_ids, attention_mask, segments)
        if supervision is None:
            logits = self.get_output_embeddings()(hidden)
            return TokenFlexOutput(logits=final_logits(logits, self.config.text_config))
        with phase("loss"):
            given, divergences = (hidden, supervision, self._exact_logits, loss_chunks), None
            if supervision.consistency is None:
                loss, token_losses, predictions = chunked_cross_entropy(*given)
            else:
                loss, token_losses, predictions, divergences = chunked_consistency(*given)
        return TokenFlexOutput(
            loss=loss,
            token_losses=token_losses,
            predictions=predictions,
            num_supervised=len(supervision.positions),
            divergences=divergences,
        )

    def image_features(
        self,
        pixel_values: Tensor,
        tile_sides: Sequence[int] | Tensor | None,
        rows: int | None = None,
    ) -> Tensor:
        """As in the class that users load."""
        if isinstance(tile_sides, Tensor):
            tile_sides = tile_sides.cpu()  # for the projector's op
        with phase("vision"):
            return super().image_features(pixel_values, tile_sides, rows)

    def to_tokens(
        self, patches: Tensor, tile_sides: Sequence[int] | Tensor, rows: int | None
    ) -> Tensor:
        """As in the class that users load."""
        with phase("projector"):
            return super().to_tokens(patches, tile_sides, rows)

    def _exact_logits(self, hidden: Tensor) -> Tensor:
        """The logits [..., V] of hidden states, in float32 behind the head."""
        logits = self.get_output_embeddings()(hidden).float()
        return final_logits(logits, self.config.text_config)

    def _insert_images(
        self,
        input_ids: Tensor,
        image_positions: Tensor,
        pixel_values: Tensor | None,
        tile_sides: Sequence[int] | Tensor | None,
        image_shapes: Shapes | None,
    ) -> Tensor:
        """Embeddings of the tokens, image features at the image positions: [B, L, D].

        Without tiles a blank one runs and contributes zero: under ZeRO-3 a rank that skips a module
        leaves the others waiting for ever.
        """
        inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is None or len(pixel_values) == 0:
            _check_count(image_positions, 0)
            size = self.config.tile_size
            blank = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=inputs_embeds.device)
            return inputs_embeds + 0 * self.image_features(blank, [self.config.smallest_side]).sum()
        if image_shapes is None:
            features = self.image_features(pixel_values, tile_sides)
        else:
            features = native_features(self, pixel_values, image_shapes)
        features = features.to(inputs_embeds.dtype)
        _check_count(image_positions, len(features))
        return insert_features(inputs_embeds, image_positions, features)

    def _decode(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        segments: PackedSegments | None,
    ) -> Tensor:
        """The language model's last hidden states [B, L, D]; no sample sees another.

        Other attention functions than ours find the samples' ends in position_ids by themselves.
        Ours gets the segments, and an unused 4D mask, which keeps transformers from searching
        position_ids: that would wait for the device.
        """
        ends: dict[str, Any] = {"attention_mask": attention_mask}
        if segments is not None and self.config.text_config._attn_implementation == ATTENTION_NAME:
            unused = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=segments.cu_seqlens.device)
            ends = {"attention_mask": unused, "segments": segments}
        decoder = self.language_model.get_decoder()
        output = decoder(
            inputs_embeds=inputs_embeds, position_ids=position_ids, use_cache=False, **ends
        )
        if segments is not None:
            check_isolation(self.config.text_config, segments)
        return output.last_hidden_state


def insert_features(inputs_embeds: Tensor, positions: Tensor, features: Tensor) -> Tensor:
    """inputs_embeds [B, L, D] with features [K, D] at positions, int64 [K], of the flattened rows.

    Backward gives features the gradient at their positions, and the embeddings there zero.
    """
    rows = inputs_embeds.flatten(0, 1).index_copy(0, positions, features)
    return rows.view_as(inputs_embeds)


def _check_count(image_positions: Tensor, features: int) -> None:
    if len(image_positions) != features:
        raise InputError(
            f"input_ids hold {len(image_positions)} image tokens, but the tiles give {features} "
            "image features; each tile of side n needs n * n <IMG_CONTEXT> tokens, each image of "
            "h x w tokens h * w"
        )
