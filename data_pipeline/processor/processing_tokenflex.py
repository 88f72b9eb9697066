"""Images, text and token counts -> the model's arguments, with the ids that training gave.

The markers are placed by id and every stretch of text between them is tokenised by itself, so that
a prompt has the ids it had in training, and text in a message cannot forge a marker.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .arguments_tokenflex import (
    as_texts,
    call_options,
    group_images,
    image_sides,
    is_batch,
    is_nested,
    side_of,
)
from .image_processing_tokenflex import flatten
from .prompt_tokenflex import (
    SPECIAL_TOKENS,
    TURN_START,
    Piece,
    chatml_template,
    encode_fast,
    encode_text,
    parse_prompt,
    protect,
    user_turn,
)

__all__ = ["TokenFlexProcessor", "chatml_template"]


class TokenFlexProcessor(ProcessorMixin):
    """Image processor, tokenizer and chat template in one.

    The five special tokens of the prompt, <img>, </img>, <IMG_CONTEXT>, <|im_start|> and
    <|im_end|>, are appended to the tokenizer where it lacks them.

    image_processor: a `TokenFlexImageProcessor`. tokenizer: any fast tokenizer; a prompt may be as
        long as its `model_max_length`, which should be the model's context.
    chat_template: a Jinja template in ChatML; see `chatml_template`, which is also the default.
    num_image_tokens: per tile, where a call gives none. patches_per_side: of the vision tower's
        patch grid; its square is the largest number of tokens.

    Raises ValueError for a num_image_tokens that this patch grid cannot give.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        num_image_tokens: int = 144,
        patches_per_side: int = 27,
    ) -> None:
        if chat_template is None:
            chat_template = chatml_template()
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.num_image_tokens, self.patches_per_side = num_image_tokens, patches_per_side
        side_of(num_image_tokens, patches_per_side)
        tokenizer.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = "<|im_end|>"
        self.image_token = "<IMG_CONTEXT>"
        self._marker_ids = {m: tokenizer.convert_tokens_to_ids(m) for m in SPECIAL_TOKENS}
        self.image_token_id = self._marker_ids[self.image_token]

    @property
    def model_input_names(self) -> list[str]:
        """The names of what a call returns."""
        return ["input_ids", "attention_mask", "pixel_values", "tile_sides"]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        num_image_tokens: int | Sequence[Any] | None = None,
        return_tensors: str | None = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """One prompt or a batch of B.

        images: see `TokenFlexImageProcessor.preprocess`; a flat list is dealt out to the
            placeholders in reading order, a list of lists holds each text's own.
        text: each is what a user says, with `<image>` where an image goes, and becomes a whole
            prompt by the chat template. Text that begins with <|im_start|> is taken for a prompt
            already, such as `apply_chat_template` renders; give words that are not your own as
            messages, where no text is taken for a marker.
        num_image_tokens: n * n tokens for each tile of an image: one number for all; one per image,
            nested as the images are; or one per text. A flat list as long as both the images and
            the texts is read per image where the images are a flat list too.
        kwargs: the image processor's settings; padding (batches are padded unless False),
            padding_side ("left" unless given), pad_to_multiple_of, max_length.

        Returns input_ids and attention_mask, int64 [B, L]; and where there are images,
        pixel_values, uint8 [T, 3, tile_size, tile_size], and tile_sides, int64 [T].

        Raises ValueError, naming the argument, when these do not fit together or a prompt is longer
        than the tokenizer's model_max_length.
        """
        tiling, padding = call_options(kwargs)
        prompts = [self._pieces(prompt) for prompt in as_texts(text)]
        placeholders = [sum(piece.is_image for piece in prompt) for prompt in prompts]
        grouped = group_images(images, placeholders)
        if num_image_tokens is None:
            num_image_tokens = self.num_image_tokens
        sides = image_sides(
            num_image_tokens, placeholders, self.patches_per_side, nested=is_nested(images)
        )
        data: dict[str, Any] = {}
        tiles: list[int] = []
        if any(placeholders):
            found = self.image_processor(flatten(grouped), **tiling)
            tiles = found["num_tiles"].tolist()
            data["pixel_values"] = torch.from_numpy(found["pixel_values"])
            data["tile_sides"] = torch.tensor(sides).repeat_interleave(torch.tensor(tiles))
        image_tokens = iter([n * n * count for n, count in zip(sides, tiles, strict=True)])
        ids = [self._encode(prompt, image_tokens, f"text[{i}]") for i, prompt in enumerate(prompts)]
        rows = self._pad(ids, return_tensors, **padding)
        if return_tensors != "pt":
            data = {name: value.numpy() for name, value in data.items()}
        return BatchFeature({**rows, **data})

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Any,
        chat_template: str | None = None,
        tokenize: bool = False,
        num_image_tokens: int | Sequence[Any] | None = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in `ProcessorMixin`: messages to a string, or with tokenize=True to ids.

        With tokenize=True and return_dict=True all that `__call__` returns, the images being inside
        the messages: {"type": "image", "image": ...} (or "url", "path", "base64").

        conversation: turns {"role", "content"}, or a list of such lists. The content is a string or
            parts {"type": "text", "text": ...} and {"type": "image", ...}; roles are an optional
            system, then user and assistant in turn.
        num_image_tokens: as in `__call__`; so are further processor_kwargs.

        Raises ValueError for messages of another form, and, where a string is asked for, for text
        that holds a marker: it could not be told from a real one.
        """
        kwargs.pop("sanitize_control_tokens", None)  # always done
        if kwargs.get("return_assistant_tokens_mask"):
            raise ValueError("return_assistant_tokens_mask is not supported; leave it out")
        batched = is_batch(conversation)
        chats = conversation if batched else [conversation]
        chats = [
            protect(
                chat, f"conversation[{i}]" if batched else "conversation", readable=not tokenize
            )
            for i, chat in enumerate(chats)
        ]
        options = dict(processor_kwargs or {})
        if num_image_tokens is not None:
            options["num_image_tokens"] = num_image_tokens
        return super().apply_chat_template(
            chats if batched else chats[0],
            chat_template=chat_template,
            tokenize=tokenize,
            processor_kwargs=options,
            **kwargs,
        )

    def _pieces(self, text: str) -> list[Piece]:
        """A text in the order of its markers, images and stretches of text."""
        if not text.startswith(TURN_START):
            text = super().apply_chat_template(
                protect([user_turn(text)], "text"), add_generation_prompt=True
            )
        return parse_prompt(text)

    def _encode(self, prompt: Sequence[Piece], image_tokens: Any, name: str) -> list[int]:
        """Ids of a prompt; takes one count from `image_tokens` per image."""
        encode, special = partial(encode_fast, self.tokenizer), set(self._marker_ids.values())
        ids: list[int] = []
        for piece in prompt:
            if piece.is_image:
                context = [self.image_token_id] * next(image_tokens)
                ids += [self._marker_ids["<img>"], *context, self._marker_ids["</img>"]]
            elif piece.is_marker:
                ids.append(self._marker_ids[piece.text])
            else:
                ids += encode_text(encode, piece.text, special, name)
        if len(ids) > self.tokenizer.model_max_length:
            raise ValueError(
                f"{name} makes a prompt of {len(ids)} tokens, {ids.count(self.image_token_id)} of "
                f"them for images, and the context holds {self.tokenizer.model_max_length}; "
                "shorten it, give fewer images or lower num_image_tokens"
            )
        return ids

    def _pad(
        self,
        ids: list[list[int]],
        return_tensors: str | None,
        padding: Any = None,
        padding_side: str | None = None,
        pad_to_multiple_of: int | None = None,
        max_length: int | None = None,
    ) -> Mapping[str, Any]:
        """input_ids and attention_mask of a batch."""
        if padding is None:
            padding = return_tensors is not None and len(ids) > 1
        if padding is False and return_tensors and len(set(map(len, ids))) > 1:
            raise ValueError(
                "padding is False, but the prompts differ in length; leave it out, or give "
                "return_tensors=None"
            )
        return self.tokenizer.pad(
            {"input_ids": ids},
            padding=padding,
            padding_side=padding_side or "left",
            pad_to_multiple_of=pad_to_multiple_of,
            max_length=max_length,
            return_attention_mask=True,
            return_tensors=return_tensors,
        )
