"""The pieces of a prompt -> ids, which of them answer, and what a limit of length leaves."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from .prompt_tokenflex import TURN_START, Piece, encode_text

_IMAGE_START, _IMAGE_END, IMAGE_TOKEN = "<img>", "</img>", "<IMG_CONTEXT>"
_TRUNCATES = {True: True, "longest_first": True, "only_first": True, False: False, None: False}
_TRUNCATES["do_not_truncate"] = False


class Encoded(NamedTuple):
    """ids: of a prompt. answers: 1 for those that training supervises: an answer and its end."""

    ids: list[int]
    answers: list[int]


def encode_pieces(
    pieces: Sequence[Piece],
    encode: Callable[[str], list[int]],
    marker_ids: Mapping[str, int],
    image_tokens: Iterator[int],
    name: str,
) -> Encoded:
    """Ids of a prompt; takes one count from `image_tokens` per image.

    encode: ids of any text, without BOS or EOS. marker_ids: of `SPECIAL_TOKENS`. name: of the
        prompt, for messages. ValueError as in `encode_text`.
    """
    ids: list[int] = []
    answers: list[int] = []
    special, answering, before = set(marker_ids.values()), False, ""
    for piece in pieces:
        if piece.is_image:
            context = [marker_ids[IMAGE_TOKEN]] * next(image_tokens)
            new = [marker_ids[_IMAGE_START], *context, marker_ids[_IMAGE_END]]
        elif piece.is_marker:
            new = [marker_ids[piece.text]]
        else:
            new = encode_text(encode, piece.text, special, name)
        ids += new
        answers += [int(answering)] * len(new)
        if piece.is_marker:  # an answer's end is the last of it
            answering = False
        elif before == TURN_START and piece.text == "assistant\n":
            answering = True
        before = piece.text if piece.is_marker else ""
    return Encoded(ids, answers)


def fitted(
    prompt: Encoded,
    tokenizer: Any,
    marker_ids: Mapping[str, int],
    name: str,
    truncation: Any = None,
    max_length: int | None = None,
) -> Encoded:
    """The prompt, cut to max_length where `truncation` says so, as transformers' tokenizers do.

    Raises ValueError where an image would be cut, and for more than the tokenizer's
    model_max_length.
    """
    length, context = len(prompt.ids), tokenizer.model_max_length
    images = _image_ids(prompt.ids, marker_ids)
    if _truncates(truncation):
        limit = context if max_length is None else max_length
        first = tokenizer.truncation_side == "right"
        keep = slice(max(limit, 0)) if first else slice(max(0, length - limit), None)
        prompt = Encoded(prompt.ids[keep], prompt.answers[keep])
        if _image_ids(prompt.ids, marker_ids) < images:
            raise ValueError(
                f"{name} has {length} tokens, {images} of them of images, and truncation to "
                f"{limit} would cut an image; raise max_length or lower num_image_tokens"
            )
    if len(prompt.ids) > context:
        raise ValueError(
            f"{name} makes a prompt of {length} tokens, {images} of them for images, and the "
            f"context holds {context}; shorten it, give fewer images, or lower num_image_tokens or "
            "max_tiles"
        )
    return prompt


def _image_ids(ids: Sequence[int], marker_ids: Mapping[str, int]) -> int:
    return sum(ids.count(marker_ids[m]) for m in (_IMAGE_START, IMAGE_TOKEN, _IMAGE_END))


def _truncates(truncation: Any) -> bool:
    try:
        return _TRUNCATES[truncation]
    except (KeyError, TypeError):
        raise ValueError(
            f"truncation is {truncation!s:.40}; give True, which cuts a text at max_length"
        ) from None
