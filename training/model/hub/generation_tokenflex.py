"""Generation from prompts with images, whichever release of transformers runs the loop.

Releases name the cache differently, cut and repeat a prompt's rows at other places, and know the
first step by other means. What they share: `generate` asks `prepare_inputs_for_generation` before
every step, a cache knows how many columns it holds, and the beams or samples of a row stand next to
each other. Nothing else is used here.
"""

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling


class PromptImages:
    """The images of the prompt that `generate` reads, encoded once for each model that reads it.

    where: bool [B, L], the prompt's image tokens. start: how many columns of the cache lie before
    the prompt's first. encoded: [rows, D], or tiles and their sides, of which a model makes them.
    """

    def __init__(
        self,
        where: Tensor,
        start: int,
        encoded: Tensor | None,
        pixel_values: Tensor | None,
        tile_sides: Sequence[int] | Tensor | None,
    ) -> None:
        self.where, self.start = where, start
        self.encoded, self.tiles = encoded, (pixel_values, tile_sides)
        self._features: dict[int, Tensor] = {}

    def features(self, model: Any) -> Tensor:
        """The image features [rows, D] of this model; another one, an assistant, has its own."""
        if self.encoded is not None:
            return self.encoded
        if id(model) not in self._features:
            self._features[id(model)] = model.image_features(*self.tiles)
        return self._features[id(model)]

    def of_step(self, model: Any, rows: int, columns: int, cached: int) -> Tensor | None:
        """Features of a step that reads so many columns of so many rows behind `cached` columns."""
        first = max(cached - self.start, 0)
        if first >= self.where.shape[1]:
            return None
        order = self.where.flatten().cumsum(0).sub(1).view_as(self.where)
        step = slice(first, first + columns)
        repeats = rows // len(self.where)
        where = self.where[:, step].repeat_interleave(repeats, 0)
        found = order[:, step].repeat_interleave(repeats, 0)[where]
        features = self.features(model)
        return features[found.to(features.device)] if len(found) else None


_reading: ContextVar[PromptImages | None] = ContextVar("the prompt that is read", default=None)


class TokenFlexGenerationMixin(GenerationMixin):
    """`generate` for what reads images, encoded or not, and ends with logits."""

    config: Any
    base_model: Any

    def _write_no_image_tokens(self) -> None:
        """Of any answer: it could not be read again, since they would have no tiles."""
        self.generation_config.suppress_tokens = [self.config.image_token_id]

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        *args: Any,
        pixel_values: Tensor | None = None,
        tile_sides: Sequence[int] | Tensor | None = None,
        mm_encoder_outputs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in `GenerationMixin`, with the tiles of the prompt's images, or what encodes them.

        Where a cache is given that holds part of the prompt: the tiles of all of it, or of what is
        behind the cache.

        Raises ValueError for a prompt that is longer than the context, and when its image tokens
        and the tiles disagree.
        """
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        embeds = kwargs.get("inputs_embeds")
        where = None
        if ids is not None or embeds is not None:
            where = self.base_model.image_positions(None if embeds is not None else ids, embeds)
            self._check_context(where.shape[1])
        images = _reading.get()
        encoded = encoded_features(mm_encoder_outputs)
        if where is not None and (pixel_values is not None or encoded is not None):
            if pixel_values is not None and encoded is not None:
                raise ValueError("give pixel_values or mm_encoder_outputs, not both")
            mask = kwargs.get("attention_mask")
            start = 0 if mask is None else mask.shape[-1] - where.shape[1]
            images = PromptImages(where, start, encoded, pixel_values, tile_sides)
            rows = len(images.features(self.base_model))
            cached = cached_columns(kwargs)
            if cached and int(where.sum()) != rows:  # the tiles are those behind the cache
                where[:, : max(cached - start, 0)] = False
            check_image_tokens(where, rows)
        elif images is not None and not _same_prompt(images.where, where):
            images = None  # another model was asked for something else in the middle of a step
        token = _reading.set(images)
        try:
            return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]
        finally:
            _reading.reset(token)

    # `generate` takes the arguments that the signature of the installed release names.
    @wraps(GenerationMixin.prepare_inputs_for_generation, assigned=())
    def prepare_inputs_for_generation(  # type: ignore[override]
        self, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """As in `GenerationMixin`, with the image features of the columns that this step reads."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]
        images, read = _reading.get(), inputs.get("input_ids")
        read = inputs.get("inputs_embeds") if read is None else read
        if images is not None and read is not None:
            rows, columns = read.shape[:2]
            features = images.of_step(self.base_model, rows, columns, cached_columns(inputs))
            if features is not None:
                output: Any = BaseModelOutputWithPooling(pooler_output=[features])  # type: ignore[arg-type]
                inputs["mm_encoder_outputs"] = {"image": output}
        return inputs

    def _check_context(self, length: int) -> None:
        context = getattr(self.config.text_config, "max_position_embeddings", None)
        if context is not None and length > context:
            raise ValueError(
                f"input_ids have {length} tokens, the language model's context is {context}; "
                "shorten the prompt, give fewer images or lower num_image_tokens"
            )


def find_cache(arguments: Mapping[str, Any]) -> Cache | None:
    """The cache among keyword arguments, known by its kind: releases give it other names."""
    return next((value for value in arguments.values() if isinstance(value, Cache)), None)


def cached_columns(arguments: Mapping[str, Any]) -> int:
    """How many columns the cache among keyword arguments holds; 0 without one."""
    cache = find_cache(arguments)
    return 0 if cache is None else int(cache.get_seq_length())


def encoded_features(outputs: Mapping[str, Any] | None) -> Tensor | None:
    """The image features [rows, D] of `mm_encoder_outputs`."""
    image = (outputs or {}).get("image")
    if image is None or image.pooler_output is None or len(image.pooler_output) == 0:
        return None
    return torch.cat(list(image.pooler_output))


def check_image_tokens(where: Tensor, rows: int) -> None:
    """Raise ValueError unless `where` [B, L] has a True for each of the image features."""
    if (found := int(where.sum())) != rows:
        raise ValueError(
            f"input_ids hold {found} image tokens, but the tiles in pixel_values give {rows} image "
            "features; each tile of side n needs n * n <IMG_CONTEXT> tokens"
        )


def _same_prompt(prompt: Tensor, where: Tensor | None) -> bool:
    """Whether what is read begins with the prompt: an assistant's ids hold what was proposed."""
    if where is None or len(where) % len(prompt) or where.shape[1] < prompt.shape[1]:
        return False
    return torch.equal(where[:, : prompt.shape[1]].to(prompt.device), prompt)
