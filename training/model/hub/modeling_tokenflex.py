"""The vision-language model: vision tower -> token-adaptive projector -> any causal language model.

B rows, L tokens, T tiles, C vision width, F projector width, D language width, V vocabulary.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast

from .configuration_tokenflex import TokenFlexConfig
from .pooling_tokenflex import pool_patches


class TokenFlexProjector(nn.Module):
    """Turns each tile's patches into n x n tokens of the language model's width, n given per tile.

    TokenFLEX (arXiv 2504.03154), section 3: pool to n x n, LayerNorm, SwiGLU, linear; the weights
    never see n.

    vision_size: C. hidden_size: F. text_size: D. grid: (rows, columns) of patches. pool: see
    `pooling_tokenflex`.
    """

    def __init__(
        self,
        vision_size: int,
        hidden_size: int,
        text_size: int,
        grid: tuple[int, int],
        pool: str = "adaptive",
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        # For printing: where the trainer shards the weights, their shapes are empty.
        self.widths = (vision_size, hidden_size, text_size)
        self.grid, self.pool, self.eps = grid, pool, eps
        self.norm_weight = nn.Parameter(torch.empty(vision_size))
        self.norm_bias = nn.Parameter(torch.empty(vision_size))
        self.w1 = nn.Parameter(torch.empty(hidden_size, vision_size))
        self.b1 = nn.Parameter(torch.empty(hidden_size))
        self.w2 = nn.Parameter(torch.empty(hidden_size, vision_size))
        self.b2 = nn.Parameter(torch.empty(hidden_size))
        self.w3 = nn.Parameter(torch.empty(text_size, hidden_size))
        self.b3 = nn.Parameter(torch.empty(text_size))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Normal weights, zero biases, identity norm: as transformers starts Linear and norm."""
        nn.init.ones_(self.norm_weight)
        for bias in (self.norm_bias, self.b1, self.b2, self.b3):
            nn.init.zeros_(bias)
        for weight in (self.w1, self.w2, self.w3):
            nn.init.normal_(weight, mean=0.0, std=std)

    def forward(self, patches: Tensor, tile_sides: Sequence[int] | Tensor) -> Tensor:
        """patches [T, H*W, C], one side n per tile -> [sum of n^2, D], tile after tile.

        Between two matrix products it computes in float32 or wider and rounds once.

        Raises ValueError unless there is one side per tile, from 1 to the patch grid's.
        """
        sides = _as_list(tile_sides)
        _check_sides(sides, len(patches), self.grid)
        rows = pool_patches(patches, sides, self.grid, self.pool).to(patches.dtype)
        wide = torch.promote_types(rows.dtype, torch.float32)
        weight, bias = self.norm_weight.to(wide), self.norm_bias.to(wide)
        rows = F.layer_norm(rows.to(wide), rows.shape[1:], weight, bias, self.eps)
        rows = rows.to(patches.dtype)
        gate, value = F.linear(rows, self.w1, self.b1), F.linear(rows, self.w2, self.b2)
        gated = (F.silu(gate.to(wide)) * value.to(wide)).to(rows.dtype)
        return F.linear(gated, self.w3, self.b3)

    def extra_repr(self) -> str:
        """Widths, grid and pool mode, for `print(model)`."""
        return f"{' -> '.join(map(str, self.widths))}, grid={self.grid}, pool={self.pool!r}"


class TokenFlexForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """TokenFLEX (arXiv 2504.03154): one model for any number n^2 of vision tokens per tile."""

    config: TokenFlexConfig
    config_class = TokenFlexConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012 - transformers' own style
    supports_gradient_checkpointing = True
    _no_split_modules = ["TokenFlexProjector"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _projector_class: type[TokenFlexProjector] = TokenFlexProjector

    def __init__(self, config: TokenFlexConfig) -> None:
        config.check_image_token()
        super().__init__(config)
        # Without the dtype a sub-model would follow the dtype its own config was saved with.
        dtype = torch.get_default_dtype()
        self.vision_model = config.vision_family.build(config.vision_config, dtype)
        self.projector = self._projector_class(
            config.vision_config.hidden_size,
            config.projector_hidden_ratio * config.vision_config.hidden_size,
            config.text_config.hidden_size,
            config.patch_grid,
            config.pool,
        )
        self.language_model = AutoModelForCausalLM.from_config(config.text_config, dtype=dtype)
        self.post_init()
        # An answer with image tokens in it could not be read again: they would have no tiles.
        self.generation_config.suppress_tokens = [config.image_token_id]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, TokenFlexProjector):
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
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        tile_sides: Sequence[int] | Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """The language model's output, its mean loss included where there are labels.

        input_ids: int64 [B, L]; one <IMG_CONTEXT> per vision token. Or inputs_embeds: [B, L, D].
        pixel_values: uint8 [T, 3, tile_size, tile_size], the tiles of all rows in reading order;
            None for text alone and behind the first step with a cache.
        tile_sides: n of each tile.
        attention_mask: [B, L], 1 for real tokens. position_ids, past_key_values, use_cache,
            logits_to_keep, kwargs: the language model's.
        labels: int64 [B, L], not shifted, -100 ignored.
        mm_encoder_outputs: {"image": what `get_image_features` returned}, instead of tiles.

        Raises ValueError when image tokens, tiles and sides disagree.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of the two")
        features = _encoded_features(mm_encoder_outputs)
        if pixel_values is not None:
            if features is not None:
                raise ValueError("give pixel_values or mm_encoder_outputs, not both")
            features = self.image_features(pixel_values, tile_sides)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if features is not None or _may_need_tiles(past_key_values):
            where = self._image_positions(input_ids, inputs_embeds)
            inputs_embeds = _insert(inputs_embeds, where, features)
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As in `GenerationMixin`; ValueError for a prompt that is longer than the context."""
        context = getattr(self.config.text_config, "max_position_embeddings", None)
        if is_first_iteration and context is not None and input_ids.shape[1] > context:
            raise ValueError(
                f"input_ids have {input_ids.shape[1]} tokens, the language model's context is "
                f"{context}; shorten the prompt, give fewer images or lower num_image_tokens"
            )
        model_inputs: dict[str, Any] = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids,  # type: ignore[arg-type]
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        # An assistant of assisted decoding reads the prompt, images included, in a later iteration.
        if _may_need_tiles(kwargs.get("past_key_values")) and kwargs.get("mm_encoder_outputs"):
            model_inputs["mm_encoder_outputs"] = kwargs["mm_encoder_outputs"]
        return model_inputs

    def get_image_features(
        self,
        pixel_values: Tensor,
        tile_sides: Sequence[int] | Tensor | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPooling:
        """As `image_features`; pooler_output holds a tensor [n * n, D] per tile.

        `generate` calls this once, before the first step.
        """
        features = self.image_features(pixel_values, tile_sides)
        counts = [n * n for n in _as_list(tile_sides)]
        per_tile: Any = list(features.split(counts))
        return BaseModelOutputWithPooling(pooler_output=per_tile)

    def image_features(
        self, pixel_values: Tensor, tile_sides: Sequence[int] | Tensor | None
    ) -> Tensor:
        """Tiles, uint8 [T, 3, tile_size, tile_size], to their tokens, [sum of n^2, D], in order.

        Raises ValueError for tiles of another kind and unless there is one side per tile.
        """
        if tile_sides is None:
            raise ValueError("pixel_values came without tile_sides; give the side n of every tile")
        size = self.config.tile_size
        if pixel_values.dtype != torch.uint8 or pixel_values.shape[1:] != (3, size, size):
            raise ValueError(
                f"pixel_values are {pixel_values.dtype} {tuple(pixel_values.shape)}; expected "
                f"torch.uint8 [tiles, 3, {size}, {size}]: cut tiles of the vision tower's "
                "image_size and do not normalise them"
            )
        if len(pixel_values) == 0:
            width = self.config.text_config.hidden_size
            return pixel_values.new_empty(0, width, dtype=self.vision_model.dtype)
        mean = _per_channel(tuple(self.config.image_mean), pixel_values.device)
        std = _per_channel(tuple(self.config.image_std), pixel_values.device)
        pixels = ((pixel_values.float() / 255 - mean) / std).to(self.vision_model.dtype)
        patches = self.config.vision_family.patches(self.vision_model, pixels)
        if isinstance(tile_sides, Tensor):
            tile_sides = tile_sides.cpu()
        return self.projector(patches, tile_sides)

    def _image_positions(self, input_ids: Tensor | None, inputs_embeds: Tensor) -> Tensor:
        """bool [B, L]: which positions are <IMG_CONTEXT>."""
        if input_ids is not None:
            return torch.eq(input_ids, self.config.image_token_id)
        token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)


def _encoded_features(outputs: dict[str, BaseModelOutputWithPooling] | None) -> Tensor | None:
    """The image features [rows, D] of `mm_encoder_outputs`."""
    image = (outputs or {}).get("image")
    if image is None or image.pooler_output is None or len(image.pooler_output) == 0:
        return None
    # Beams, and prompts read in chunks, come here as other lists than the one per tile.
    return torch.cat(list(image.pooler_output))


def _may_need_tiles(cache: Cache | None) -> bool:
    """Whether these are a prompt's first tokens; asking a compiled graph would break it."""
    return not torch.compiler.is_compiling() and (cache is None or cache.get_seq_length() == 0)


def _insert(inputs_embeds: Tensor, where: Tensor, features: Tensor | None) -> Tensor:
    """Put features [rows, D] at the True positions of `where` [B, L], row after row."""
    rows = 0 if features is None else len(features)
    if not torch.compiler.is_compiling() and (found := int(where.sum())) != rows:
        raise ValueError(
            f"input_ids hold {found} image tokens, but the tiles in pixel_values give {rows} image "
            "features; each tile of side n needs n * n <IMG_CONTEXT> tokens"
        )
    if features is None or rows == 0:
        return inputs_embeds
    features = features.to(inputs_embeds.device, inputs_embeds.dtype)
    # Counted over positions, not elements, and no count goes to the host: it compiles whole.
    feature_of_position = where.flatten().cumsum(0).sub(1).clamp(0, rows - 1)
    spread = features.index_select(0, feature_of_position).view_as(inputs_embeds)
    return torch.where(where[..., None], spread, inputs_embeds)


def _as_list(tile_sides: Sequence[int] | Tensor | None) -> list[int]:
    values = tile_sides.tolist() if isinstance(tile_sides, Tensor) else list(tile_sides or ())
    return [int(n) for n in values]


def _check_sides(tile_sides: Sequence[int], tiles: int, grid: tuple[int, int]) -> None:
    if len(tile_sides) != tiles:
        raise ValueError(
            f"tile_sides has {len(tile_sides)} entries for {tiles} tiles; give one side per tile"
        )
    largest = min(grid)
    for n in set(tile_sides):
        if not 1 <= n <= largest:
            raise ValueError(
                f"tile_sides has {n}; a tile has {grid[0]} x {grid[1]} patches, so give sides from "
                f"1 to {largest}"
            )


@lru_cache(maxsize=64)
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """[3, 1, 1] on a device; copied there once, since each copy waits for the device."""
    with torch.inference_mode(False):  # training may use what inference has cached
        return torch.tensor(values, device=device).view(3, 1, 1)
