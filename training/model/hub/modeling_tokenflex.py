"""The vision-language model: vision tower -> token-adaptive projector -> any causal language model.

`TokenFlexModel` ends with the hidden states, `TokenFlexForConditionalGeneration` puts a head on it.

B rows, L tokens, T tiles, C vision width, F projector width, D language width, V vocabulary.
"""

# First: it names the release that is needed, where the rest could not be imported.
from .releases_tokenflex import OLDEST  # noqa: F401  # isort: skip

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.utils import can_return_tuple

from .configuration_tokenflex import TokenFlexConfig
from .generation_tokenflex import (
    TokenFlexGenerationMixin,
    cached_columns,
    check_image_tokens,
    encoded_features,
)
from .language_model_tokenflex import (
    EARLIER_NAMES,
    choose_attention,
    decoder_and_head,
    final_logits,
)
from .token_method_tokenflex import TokenMethod, as_list, in_graph
from .token_methods_tokenflex import METHODS

if TYPE_CHECKING:  # older releases copy from a folder only the files that are named here
    from .merge_tokens_tokenflex import MergeProjector  # noqa: F401
    from .pooling_tokenflex import pool_patches  # noqa: F401
    from .projector_tokenflex import TokenFlexProjector  # noqa: F401
    from .query_tokens_tokenflex import QueryProjector  # noqa: F401
    from .select_tokens_tokenflex import SelectProjector  # noqa: F401
    from .unshuffle_tokenflex import UnshuffleProjector  # noqa: F401
    from .vision_clip_tokenflex import CLIP  # noqa: F401
    from .vision_family_tokenflex import VisionFamily  # noqa: F401
    from .vision_siglip2_tokenflex import SIGLIP2  # noqa: F401
    from .vision_siglip_tokenflex import SIGLIP  # noqa: F401
    from .vision_towers_tokenflex import vision_family  # noqa: F401

AUTO_MAP = {
    "AutoModel": "modeling_tokenflex.TokenFlexModel",
    "AutoModelForImageTextToText": "modeling_tokenflex.TokenFlexForConditionalGeneration",
}
"""Which class each Auto class of transformers gives, for a folder that holds this code."""


class TokenFlexPreTrainedModel(PreTrainedModel):
    """What the classes here have in common: what transformers asks of them, loading, saving."""

    config: TokenFlexConfig
    config_class = TokenFlexConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012 - transformers' own style
    supports_gradient_checkpointing = True
    _no_split_modules = [method.__name__ for method in METHODS.values()]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _checkpoint_conversion_mapping = EARLIER_NAMES  # by which PEFT loads earlier adapters

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, TokenMethod):
            # transformers guards torch.nn.init here, so that loaded weights are left alone.
            module.reset_parameters(getattr(self.config.text_config, "initializer_range", 0.02))

    @classmethod
    def from_pretrained(
        cls, *args: Any, key_mapping: dict[str, str] | None = None, **kwargs: Any
    ) -> Any:
        """As in `PreTrainedModel`; a folder with the names of an earlier layout loads as well."""
        mapping = EARLIER_NAMES if key_mapping is None else key_mapping
        loaded = super().from_pretrained(*args, key_mapping=mapping, **kwargs)
        model: Any = loaded[0] if isinstance(loaded, tuple) else loaded
        # transformers would save by the names that it loaded, as it does where users map keys.
        if key_mapping is None and getattr(model, "_weight_conversions", None):
            model._weight_conversions = [
                conversion
                for conversion in model._weight_conversions
                if not mapping.keys() >= set(conversion.source_patterns)
            ]
        return loaded

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in `PreTrainedModel`; where the code is saved, too, for both Auto classes."""
        if self._auto_class is not None:
            self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), **AUTO_MAP}
        super().save_pretrained(*args, **kwargs)


class TokenFlexModel(TokenFlexPreTrainedModel):
    """Images and tokens to the last hidden states: vision tower, projector and decoder."""

    # The head of a folder with one, which a base model is loaded without.
    _keys_to_ignore_on_load_unexpected: list[str] | None = [r"^lm_head\."]  # noqa: RUF012
    _token_methods: Mapping[str, type[TokenMethod]] = METHODS

    def __init__(
        self, config: TokenFlexConfig, take_head: Callable[[nn.Module], None] | None = None
    ) -> None:
        """take_head: called with the language model's head, which is built with its decoder."""
        config.check_image_token()
        super().__init__(config)
        # Without the dtype a sub-model would follow the dtype its own config was saved with.
        dtype = torch.get_default_dtype()
        self.vision_model = config.vision_family.build(config.vision_config, dtype)
        self.projector = self._token_methods[config.projector_method](
            config.vision_config.hidden_size,
            config.projector_hidden_ratio * config.vision_config.hidden_size,
            config.text_config.hidden_size,
            config.patch_grid,
            config.pool,
            num_tokens=config.projector_num_tokens,
        )
        choose_attention(config.text_config)
        causal = AutoModelForCausalLM.from_config(config.text_config, dtype=dtype)
        self.language_model, head = self._language_model_and_head(causal)
        if take_head is not None:
            take_head(head)
        self.post_init()

    def _language_model_and_head(
        self, causal: PreTrainedModel
    ) -> tuple[PreTrainedModel, nn.Module]:
        """What `language_model` is, and the head of it."""
        return decoder_and_head(causal)

    def get_input_embeddings(self) -> nn.Module:
        """The language model's token embedding."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's token embedding."""
        self.language_model.set_input_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        tile_sides: Sequence[int] | Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """The decoder's output.

        input_ids: int64 [B, L]; one <IMG_CONTEXT> per vision token. Or inputs_embeds: [B, L, D].
        pixel_values: uint8 [T, 3, tile_size, tile_size], the tiles of all rows in reading order;
            None for text alone and behind the first step with a cache.
        tile_sides: n of each tile.
        attention_mask: [B, L], 1 for real tokens. position_ids, kwargs (use_cache, the cache, by
            its name in the installed transformers, and others): the language model's.
        mm_encoder_outputs: {"image": what `get_image_features` returned}, instead of tiles.

        Raises ValueError when image tokens, tiles and sides disagree.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of the two")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        positions = inputs_embeds.shape[0] * inputs_embeds.shape[1]
        features = encoded_features(mm_encoder_outputs)
        if pixel_values is not None:
            if features is not None:
                raise ValueError("give pixel_values or mm_encoder_outputs, not both")
            features = self.image_features(pixel_values, tile_sides, positions)
        if features is not None or _may_need_tiles(kwargs):
            where = self.image_positions(input_ids, inputs_embeds)
            count: int | Tensor = 0 if features is None else len(features)
            if pixel_values is not None and in_graph(tile_sides):
                count = tile_sides.square().sum()
            _check_count(where, count)
            if features is not None:
                inputs_embeds = _insert(inputs_embeds, where, features)
        output: BaseModelOutputWithPast = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            return_dict=True,
            **kwargs,
        )
        return output

    def get_image_features(
        self,
        pixel_values: Tensor,
        tile_sides: Sequence[int] | Tensor | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPooling:
        """As `image_features`; pooler_output holds a tensor [n * n, D] per tile."""
        features = self.image_features(pixel_values, tile_sides)
        counts = [n * n for n in as_list(tile_sides)]
        per_tile: Any = list(features.split(counts))
        return BaseModelOutputWithPooling(pooler_output=per_tile)

    def image_features(
        self,
        pixel_values: Tensor,
        tile_sides: Sequence[int] | Tensor | None,
        rows: int | None = None,
    ) -> Tensor:
        """Tiles, uint8 [T, 3, tile_size, tile_size], to their tokens, [sum of n^2, D], in order.

        rows: see `TokenMethod.forward`.

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
        # A graph holds its constants by itself, and torch.compile warns of the cache.
        channels = _per_channel.__wrapped__ if torch.compiler.is_compiling() else _per_channel
        mean = channels(tuple(self.config.image_mean), pixel_values.device)
        std = channels(tuple(self.config.image_std), pixel_values.device)
        pixels = ((pixel_values.float() / 255 - mean) / std).to(self.vision_model.dtype)
        patches = self.config.vision_family.patches(self.vision_model, pixels)
        return self.to_tokens(patches, tile_sides, rows)

    def to_tokens(
        self, patches: Tensor, tile_sides: Sequence[int] | Tensor, rows: int | None
    ) -> Tensor:
        """Patches [T, H*W, C] to [sum of n^2, D]; see `TokenMethod.forward`."""
        tokens: Tensor = self.projector(patches, tile_sides, rows)
        return tokens

    def image_positions(self, input_ids: Tensor | None, inputs_embeds: Tensor) -> Tensor:
        """bool [B, L]: which positions are <IMG_CONTEXT>."""
        if input_ids is not None:
            return torch.eq(input_ids, self.config.image_token_id)
        token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)


class TokenFlexForConditionalGeneration(TokenFlexPreTrainedModel, TokenFlexGenerationMixin):
    """TokenFLEX (arXiv 2504.03154): one model for any number n^2 of vision tokens per tile."""

    def __init__(self, config: TokenFlexConfig) -> None:
        super().__init__(config)
        heads: list[nn.Module] = []
        self.model = TokenFlexModel(config, heads.append)
        (self.lm_head,) = heads
        embedding = self.get_input_embeddings()
        (name,) = (name for name, part in self.named_modules() if part is embedding)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()
        self._write_no_image_tokens()

    def get_input_embeddings(self) -> nn.Module:
        """The language model's token embedding."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's token embedding."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The language model's head."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's head."""
        self.lm_head = value

    def get_image_features(
        self,
        pixel_values: Tensor,
        tile_sides: Sequence[int] | Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """As in `TokenFlexModel`."""
        return self.model.get_image_features(pixel_values, tile_sides, **kwargs)

    @can_return_tuple
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
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the mean loss where there are labels.

        labels: int64 [B, L], not shifted, -100 ignored.
        logits_to_keep: of how many positions at the end, or of which; 0 for all.

        The other arguments, and errors: as in `TokenFlexModel`.
        """
        output = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            tile_sides=tile_sides,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept])
        logits = final_logits(logits, self.config.text_config)
        loss = None
        if labels is not None:
            vocab_size = self.config.text_config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
        # Releases give the cache other names.
        others = {name: value for name, value in output.items() if name != "last_hidden_state"}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **others)


def _may_need_tiles(arguments: Mapping[str, Any]) -> bool:
    """Whether these are a prompt's first tokens; a compiled graph cannot ask, and looks always."""
    return torch.compiler.is_compiling() or cached_columns(arguments) == 0


def _check_count(where: Tensor, count: int | Tensor) -> None:
    """As `check_image_tokens`; in a compiled graph an assertion, which does not break it."""
    if torch.compiler.is_compiling():
        torch._assert_async(
            where.sum() == count,
            "input_ids do not hold the image tokens of the tiles: each tile of side n needs n * n",
        )
    else:
        check_image_tokens(where, int(count))


def _insert(inputs_embeds: Tensor, where: Tensor, features: Tensor) -> Tensor:
    """Put features [rows, D] at the True positions of `where` [B, L], row after row."""
    rows = len(features)
    if rows == 0:
        return inputs_embeds
    features = features.to(inputs_embeds.device, inputs_embeds.dtype)
    # Counted over positions, not elements, and no count goes to the host: it compiles whole.
    feature_of_position = where.flatten().cumsum(0).sub(1).clamp(0, rows - 1)
    spread = features.index_select(0, feature_of_position).view_as(inputs_embeds)
    return torch.where(where[..., None], spread, inputs_embeds)


@lru_cache(maxsize=64)
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """[3, 1, 1] on a device; copied there once, since each copy waits for the device."""
    with torch.inference_mode(False):  # training may use what inference has cached
        return torch.tensor(values, device=device).view(3, 1, 1)
