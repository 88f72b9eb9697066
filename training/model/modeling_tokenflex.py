"""The vision-language model: SigLIP tower -> token-adaptive projector -> any causal language model.

B rows (1 when packed), L tokens, S samples, T tiles, D language width, V vocabulary,
K supervised positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel, SiglipVisionModel
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from data_pipeline.errors import InputError
from training.model.attention import ATTENTION_NAME
from training.model.configuration_tokenflex import TokenFlexConfig
from training.model.loss import chunked_cross_entropy, find_supervision
from training.model.projector import TokenAdaptiveProjector
from training.model.segments import PackedSegments, find_segments

_PACKABLE_LAYERS = ("full_attention", "sliding_attention")


@dataclass
class TokenFlexOutput(ModelOutput):
    """What a forward returns.

    loss: float32 scalar, the sum of weight * cross-entropy, not normalised.
    token_losses: float32 [K], detached. predictions: int64 [K], the most likely ids. Both in order
        of the supervised positions. num_supervised: K.
    logits: [B, L, V], only without labels. past_key_values: with use_cache.
    """

    loss: Tensor | None = None
    token_losses: Tensor | None = None
    predictions: Tensor | None = None
    logits: Tensor | None = None
    num_supervised: int | None = None
    past_key_values: Cache | None = None


class TokenFlexForConditionalGeneration(PreTrainedModel):
    """TokenFLEX (arXiv 2504.03154): one model for any number n^2 of vision tokens per tile."""

    config: TokenFlexConfig
    config_class = TokenFlexConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TokenAdaptiveProjector"]  # noqa: RUF012 - transformers' own style
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: TokenFlexConfig) -> None:
        config.check_language_model()
        if config._attn_implementation is None:
            config._attn_implementation = ATTENTION_NAME
        super().__init__(config)
        # Without the dtype a sub-model would follow the dtype its own config was saved with.
        dtype = torch.get_default_dtype()
        self.vision_model = SiglipVisionModel._from_config(config.vision_config, dtype=dtype)
        self.projector = TokenAdaptiveProjector(
            config.vision_config.hidden_size,
            config.projector_hidden_ratio * config.vision_config.hidden_size,
            config.text_config.hidden_size,
            config.patch_grid,
            config.pool,
        )
        self.language_model = AutoModelForCausalLM.from_config(config.text_config, dtype=dtype)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, TokenAdaptiveProjector):
            # transformers guards torch.nn.init here, so that loaded weights are left alone.
            module.reset_parameters(getattr(self.config.text_config, "initializer_range", 0.02))

    def get_input_embeddings(self) -> nn.Module:
        """The language model's token embedding."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's token embedding."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The language model's head."""
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's head."""
        self.language_model.set_output_embeddings(value)

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        tile_sides: Sequence[int] | Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        labels: Tensor | None = None,
        loss_weights: Tensor | None = None,
        loss_chunks: int = 1,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
    ) -> TokenFlexOutput:
        """Loss of a pack, or logits.

        input_ids: int64 [B, L]; one <IMG_CONTEXT> per vision token.
        pixel_values: uint8 [T, 3, tile_size, tile_size], or None.
        tile_sides: n of each tile, on the host.
        position_ids: int64 [B, L], restarting at 0 per sample.
        cu_seqlens: int32 [S + 1], for packs (B = 1); when None, found from position_ids that
            restart. max_seqlen: the longest sample, on the host.
        labels: int64 [B, L], not shifted, -100 ignored, a sample's first token never supervised.
            Left on the host they save a wait for the device. loss_weights: float32 [B, L].
        loss_chunks: see `chunked_cross_entropy`.
        attention_mask: [B, L], 1 for real tokens: padded rows at inference.
        past_key_values, use_cache: as everywhere in transformers; inference of one sample a row.
        logits_to_keep: without labels, logits for this many last positions only; 0 for all.

        Raises InputError (a ValueError) when image tokens, tiles and sides disagree. On CUDA a
        disagreeing count of image tokens fails a device-side assertion instead: checking it on the
        host would wait for the device.
        """
        # First what may wait for the device, before this forward has queued any work there.
        supervision = None
        if labels is not None:
            supervision = find_supervision(labels, loss_weights, input_ids.device)
        segments = None
        if len(input_ids) == 1 and attention_mask is None and past_key_values is None:
            segments = find_segments(input_ids, position_ids, cu_seqlens, max_seqlen)
        elif cu_seqlens is not None:
            raise InputError(
                f"cu_seqlens came with {len(input_ids)} rows, an attention_mask or a cache; give "
                "the whole pack as one row without them"
            )
        inputs_embeds = self.get_input_embeddings()(input_ids)
        if past_key_values is None or past_key_values.get_seq_length() == 0:
            inputs_embeds = self._insert_images(input_ids, inputs_embeds, pixel_values, tile_sides)
        decoded = self.language_model.get_decoder()(
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **self._attention_arguments(attention_mask, segments),
        )
        self._check_isolation(segments)
        lm_head, hidden = self.get_output_embeddings(), decoded.last_hidden_state
        if supervision is None:
            logits = lm_head(hidden[:, -logits_to_keep:])
            return TokenFlexOutput(logits=logits, past_key_values=decoded.past_key_values)
        loss, token_losses, predictions = chunked_cross_entropy(
            hidden, supervision, lm_head, loss_chunks
        )
        return TokenFlexOutput(
            loss=loss,
            token_losses=token_losses,
            predictions=predictions,
            num_supervised=len(supervision.positions),
            past_key_values=decoded.past_key_values,
        )

    def image_features(self, pixel_values: Tensor, tile_sides: Sequence[int] | Tensor) -> Tensor:
        """Tiles, uint8 [T, 3, tile_size, tile_size], to their tokens, [sum of n^2, D], in order."""
        size = self.config.tile_size
        if pixel_values.dtype != torch.uint8 or pixel_values.shape[1:] != (3, size, size):
            raise InputError(
                f"pixel_values are {pixel_values.dtype} {tuple(pixel_values.shape)}; expected "
                f"torch.uint8 [tiles, 3, {size}, {size}]: cut tiles of the vision tower's "
                "image_size and do not normalise them"
            )
        device = pixel_values.device
        mean = _per_channel(tuple(self.config.image_mean), device)
        std = _per_channel(tuple(self.config.image_std), device)
        pixels = ((pixel_values.float() / 255 - mean) / std).to(self.vision_model.dtype)
        patches = self.vision_model(pixel_values=pixels).last_hidden_state  # [T, patches, C]
        return self.projector(patches, tile_sides)

    def _insert_images(
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor,
        pixel_values: Tensor | None,
        tile_sides: Sequence[int] | Tensor | None,
    ) -> Tensor:
        """Put the image features at the image positions of inputs_embeds [B, L, D].

        Without tiles a blank one runs and contributes zero: under ZeRO-3 a rank that skips a module
        leaves the others waiting for ever.
        """
        image_positions = torch.eq(input_ids, self.config.image_token_id)
        if pixel_values is None or len(pixel_values) == 0:
            _check_count(image_positions, 0)
            size = self.config.tile_size
            blank = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=inputs_embeds.device)
            return inputs_embeds + 0 * self.image_features(blank, [1]).sum()
        if tile_sides is None:
            raise InputError("pixel_values came without tile_sides; give the side n of every tile")
        features = self.image_features(pixel_values, tile_sides).to(inputs_embeds.dtype)
        _check_count(image_positions, len(features))
        return inputs_embeds.masked_scatter(image_positions[..., None], features)

    def _attention_arguments(
        self, attention_mask: Tensor | None, segments: PackedSegments | None
    ) -> dict[str, Any]:
        """How the decoder learns where samples end.

        Other attention functions than ours find that in position_ids by themselves. Ours gets the
        segments, and an unused 4D mask, which keeps transformers from searching position_ids: that
        would wait for the device.
        """
        if segments is None or self.config.text_config._attn_implementation != ATTENTION_NAME:
            return {"attention_mask": attention_mask}
        unused = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=segments.cu_seqlens.device)
        return {"attention_mask": unused, "segments": segments}

    def _check_isolation(self, segments: PackedSegments | None) -> None:
        """Raise InputError if a pack just ran through layers that do not keep samples apart."""
        if segments is None:
            return
        text_config = self.config.text_config
        layers = set(getattr(text_config, "layer_types", None) or []).difference(_PACKABLE_LAYERS)
        if layers:
            raise InputError(
                f"text_config.layer_types has {', '.join(sorted(layers))}: such layers do not keep "
                f"packed samples apart; use a model with {' and '.join(_PACKABLE_LAYERS)} only"
            )
        if text_config._attn_implementation == ATTENTION_NAME and not segments.used:
            raise InputError(
                f"the language model {text_config.model_type!r} does not hand extra arguments to "
                "its attention, so packed samples would see each other; use one that supports "
                "attention backends"
            )


@lru_cache(maxsize=64)
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """[3, 1, 1] on a device; copied there once, since each copy waits for the device."""
    with torch.inference_mode(False):  # training may use what inference has cached
        return torch.tensor(values, device=device).view(3, 1, 1)


def _check_count(image_positions: Tensor, features: int) -> None:
    """One image position per feature: InputError on CPU, an asynchronous assertion elsewhere."""
    found = image_positions.sum()
    if image_positions.device.type != "cpu":
        torch._assert_async(
            found == features, f"input_ids do not hold the {features} image tokens of the tiles"
        )
    elif found != features:
        raise InputError(
            f"input_ids hold {int(found)} image tokens, but the tiles give {features} image "
            "features; each tile of side n needs n * n <IMG_CONTEXT> tokens"
        )


AutoModel.register(TokenFlexConfig, TokenFlexForConditionalGeneration)
