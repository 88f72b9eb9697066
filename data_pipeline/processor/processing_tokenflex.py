"""Images, text and token counts -> the model's arguments, with the ids that training gave.

The markers are placed by id and every stretch of text between them is tokenised by itself, so that
a prompt has the ids it had in training, and text in a message cannot forge a marker.
"""

# First: it names the release that is needed, where the rest could not be imported.
from .releases_tokenflex import OLDEST  # noqa: F401  # isort: skip

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

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
from .encoding_tokenflex import IMAGE_TOKEN, Encoded, encode_pieces, fitted
from .image_processing_tokenflex import flatten
from .prompt_tokenflex import SPECIAL_TOKENS, encode_fast, parse_prompt, protect
from .template_tokenflex import chatml_template

if TYPE_CHECKING:  # older releases copy from a folder only the files that are named here
    from .picture_tokenflex import resize  # noqa: F401
    from .source_tokenflex import load_rgb  # noqa: F401
    from .tiling_tokenflex import cut_tiles  # noqa: F401

__all__ = ["TokenFlexProcessor", "chatml_template"]


class TokenFlexProcessor(ProcessorMixin):
    """Image processor, tokenizer and chat template in one.

    The five special tokens of the prompt, <img>, </img>, <IMG_CONTEXT>, <|im_start|> and
    <|im_end|>, are appended to the tokenizer where it lacks them. Batches are padded on the
    tokenizer's `padding_side`, which is saved: left, as generation needs, unless the tokenizer was
    given another.

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
        if "padding_side" not in tokenizer.init_kwargs:
            tokenizer.padding_side = "left"
        self.image_token = IMAGE_TOKEN
        self._marker_ids = {m: tokenizer.convert_tokens_to_ids(m) for m in SPECIAL_TOKENS}
        self.image_token_id = self._marker_ids[self.image_token]

    @property
    def model_input_names(self) -> list[str]:
        """The names of what a call returns."""
        return ["input_ids", "attention_mask", "pixel_values", "tile_sides"]

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As in `ProcessorMixin`, with the tokenizer's padding side."""
        self.tokenizer.init_kwargs["padding_side"] = self.tokenizer.padding_side
        return super().save_pretrained(save_directory, *args, **kwargs)

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        num_image_tokens: int | Sequence[Any] | None = None,
        return_tensors: str | None = "pt",
        messages: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """A text, a prompt or a batch of B.

        images: see `TokenFlexImageProcessor.preprocess`; a flat list is dealt out to the
            placeholders in reading order, a list of lists holds each text's own.
        text: becomes its tokens, no more: <|im_start|> and <|im_end|> in it are these markers, as
            in what `apply_chat_template` renders, and <image> is where an image goes.
        messages: in place of text and images, a conversation that ends with the user's turn, or a
            list of them, as `apply_chat_template` takes it: becomes the prompt of an answer, and no
            text in it is taken for a marker.
        num_image_tokens: n * n tokens for each tile of an image: one number for all; one per image,
            nested as the images are; or one per text. A flat list as long as both the images and
            the texts is read per image where the images are a flat list too.
        kwargs: the image processor's settings; padding (batches are padded unless False),
            padding_side (the tokenizer's unless given), pad_to_multiple_of; truncation to
            max_length, on the tokenizer's truncation_side; return_assistant_tokens_mask.

        Returns input_ids and attention_mask, int64 [B, L]; where there are images, pixel_values,
        uint8 [T, 3, tile_size, tile_size], and tile_sides, int64 [T]; and if asked for
        assistant_masks, int64 [B, L], 1 for what training supervises: answers and their <|im_end|>.

        Raises ValueError, naming the argument, when these do not fit together, truncation would cut
        an image, or a prompt is longer than the tokenizer's model_max_length.
        """
        if messages is not None:
            return self._prompt(messages, images, text, num_image_tokens, return_tensors, kwargs)
        tiling, options = call_options(kwargs)
        prompts = [parse_prompt(prompt) for prompt in as_texts(text)]
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
        encode = partial(encode_fast, self.tokenizer)
        encoded = [
            encode_pieces(prompt, encode, self._marker_ids, image_tokens, f"text[{i}]")
            for i, prompt in enumerate(prompts)
        ]
        rows = self._rows(encoded, return_tensors, **options)
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
        num_image_tokens: as in `__call__`; so are further processor_kwargs, and
            return_assistant_tokens_mask.

        Raises ValueError for messages of another form, and, where a string is asked for, for text
        that holds a marker: it could not be told from a real one.
        """
        kwargs.pop("sanitize_control_tokens", None)  # always done
        with_mask = kwargs.pop("return_assistant_tokens_mask", False)
        if with_mask and not (tokenize and kwargs.get("return_dict")):
            raise ValueError(
                "return_assistant_tokens_mask needs tokenize=True and return_dict=True; give both"
            )
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
        if with_mask:  # not transformers' own, which searches the rendered string
            options["return_assistant_tokens_mask"] = True
        return super().apply_chat_template(
            chats if batched else chats[0],
            chat_template=chat_template,
            tokenize=tokenize,
            processor_kwargs=options,
            **kwargs,
        )

    def _prompt(
        self,
        messages: Any,
        images: Any,
        text: Any,
        num_image_tokens: Any,
        return_tensors: str | None,
        options: Mapping[str, Any],
    ) -> BatchFeature:
        """A call with messages."""
        if text is not None or images is not None:
            raise ValueError("messages hold text and images; leave out the arguments text, images")
        found: BatchFeature = self.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=True,
            return_tensors=return_tensors,
            add_generation_prompt=True,
            num_image_tokens=num_image_tokens,
            processor_kwargs=options,
        )
        for chat in messages if is_batch(messages) else [messages]:
            if chat[-1]["role"] != "user":
                raise ValueError(
                    "messages ends with the assistant's turn, and a prompt with the user's; use "
                    "apply_chat_template for a whole conversation, or to go on with an answer"
                )
        return found

    def _rows(
        self,
        encoded: Sequence[Encoded],
        return_tensors: str | None,
        padding: Any = None,
        padding_side: str | None = None,
        pad_to_multiple_of: int | None = None,
        truncation: Any = None,
        max_length: int | None = None,
        return_assistant_tokens_mask: bool = False,
    ) -> Mapping[str, Any]:
        """input_ids, attention_mask and assistant_masks of a batch."""
        encoded = [
            fitted(each, self.tokenizer, self._marker_ids, f"text[{i}]", truncation, max_length)
            for i, each in enumerate(encoded)
        ]
        if padding is None:
            padding = return_tensors is not None and len(encoded) > 1
        if padding is False and return_tensors and len({len(ids) for ids, _ in encoded}) > 1:
            raise ValueError(
                "padding is False, but the prompts differ in length; leave it out, or give "
                "return_tensors=None"
            )
        rows = self.tokenizer.pad(
            {"input_ids": [ids for ids, _ in encoded]},
            padding=padding,
            padding_side=padding_side,
            pad_to_multiple_of=pad_to_multiple_of,
            max_length=max_length,
            return_attention_mask=True,
        )
        if return_assistant_tokens_mask:
            rows["assistant_masks"] = [
                [next(own) if real else 0 for real in mask]
                for mask, own in zip(
                    rows["attention_mask"], (iter(answers) for _, answers in encoded), strict=True
                )
            ]
        return rows.convert_to_tensors(return_tensors)
