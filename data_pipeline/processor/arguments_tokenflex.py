"""What a call of the processor was given: taken apart, and checked against each other."""

import math
from collections.abc import Mapping, Sequence
from reprlib import repr as brief
from typing import Any

from .image_processing_tokenflex import TokenFlexImagesKwargs, flatten
from .prompt_tokenflex import IMAGE

_TEXT_OPTIONS = (
    *("padding", "padding_side", "pad_to_multiple_of"),
    *("truncation", "max_length", "return_assistant_tokens_mask"),
)
# What other libraries pass along; the prompt's form decides these.
_WITHOUT_EFFECT = {
    "add_special_tokens": (True, False, None),
    "return_attention_mask": (True, None),
    "return_token_type_ids": (False, None),
    "return_mm_token_type_ids": (False, None),
    "sanitize_control_tokens": (True, False, None),
    "videos": (None,),
    "audio": (None,),
}


def call_options(kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the image processor's settings, the text's) of a call; ValueError for any other."""
    given: dict[str, Any] = {}
    for key, value in kwargs.items():  # transformers lets callers group them, too
        group = key in ("text_kwargs", "images_kwargs", "common_kwargs")
        given.update(value if group else {key: value})
    tiling = {k: given.pop(k) for k in TokenFlexImagesKwargs.__annotations__ if k in given}
    texts = {k: given.pop(k) for k in _TEXT_OPTIONS if k in given}
    for key, value in given.items():
        if key not in _WITHOUT_EFFECT:
            known = ", ".join([*TokenFlexImagesKwargs.__annotations__, *_TEXT_OPTIONS])
            raise ValueError(f"the processor has no argument {key}; its settings are {known}")
        if not any(value is allowed for allowed in _WITHOUT_EFFECT[key]):
            raise ValueError(f"{key} is {brief(value)}, which is not supported; leave it out")
    return tiling, texts


def as_texts(text: Any) -> list[str]:
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, list | tuple) or not texts:
        raise ValueError(
            f"text is {'empty' if texts in ([], ()) else f'of type {type(text).__name__}'}; give a "
            f"string, or a list of them, with {IMAGE} where an image goes, or messages"
        )
    for i, entry in enumerate(texts):
        if not isinstance(entry, str):
            raise ValueError(
                f"text[{i}] is of type {type(entry).__name__}; give a string, or turns as messages"
            )
    return list(texts)


def is_nested(images: Any) -> bool:
    return isinstance(images, list | tuple) and any(isinstance(i, list | tuple) for i in images)


def is_batch(conversation: Any) -> bool:
    """Whether these are several conversations."""
    listed = isinstance(conversation, list | tuple) and len(conversation) > 0
    return listed and not isinstance(conversation[0], Mapping)


def side_of(count: Any, patches_per_side: int) -> int:
    """n of n * n tokens; ValueError unless a patch grid of this side can give so many."""
    number = isinstance(count, int) and not isinstance(count, bool)
    n = math.isqrt(count) if number and count > 0 else 0
    if n > patches_per_side:
        raise ValueError(
            f"num_image_tokens is {count}, but a tile has only {patches_per_side} x "
            f"{patches_per_side} patches; give at most {patches_per_side**2}"
        )
    if n < 1 or n * n != count:
        near = {max(n, 1) ** 2, min(n + 1, patches_per_side) ** 2}
        raise ValueError(
            f"num_image_tokens is {brief(count)}, but the tokens of a tile are a square, n * n; "
            f"give {' or '.join(map(str, sorted(near)))}, say"
        )
    return n


def image_sides(
    counts: Any, placeholders: Sequence[int], patches_per_side: int, nested: bool
) -> list[int]:
    """n of each image, in reading order.

    counts: num_image_tokens as `TokenFlexProcessor` takes it. placeholders: images of each text.
    nested: whether the images came as a list per text.
    """
    images, texts = sum(placeholders), len(placeholders)
    if hasattr(counts, "tolist"):
        counts = counts.tolist()
    if not isinstance(counts, list | tuple):
        return [side_of(counts, patches_per_side)] * images
    flat = flatten(list(counts))
    if is_nested(counts):
        fits = [len(flatten(entry)) for entry in counts] == list(placeholders)
        expected = f"one list per text, of {', '.join(map(str, placeholders))} numbers"
    else:
        if len(flat) == texts and (nested or texts != images):
            flat = [n for n, own in zip(flat, placeholders, strict=True) for _ in range(own)]
        fits = len(flat) == images
        expected = f"one number for all, {images} (one per image) or {texts} (one per text)"
    if not fits:
        raise ValueError(
            f"num_image_tokens is {brief(counts)}, but the images are {images} in {texts} text(s); "
            f"give {expected}"
        )
    return [side_of(count, patches_per_side) for count in flat]


def group_images(images: Any, placeholders: Sequence[int]) -> list[list[Any]]:
    """The images of each text; ValueError unless there is one per placeholder."""
    texts = len(placeholders)
    if is_nested(images):
        groups = [flatten(entry) if entry is not None else [] for entry in images]
        if len(groups) != texts:
            raise ValueError(
                f"images holds {len(groups)} lists for {texts} texts; give one list per text"
            )
        for i, (group, expected) in enumerate(zip(groups, placeholders, strict=True)):
            _check_images(len(group), expected, f"images[{i}]", f"text[{i}]")
        return groups
    flat = [] if images is None else flatten(images)
    _check_images(len(flat), sum(placeholders), "images", "text")
    remaining = iter(flat)
    return [[next(remaining) for _ in range(own)] for own in placeholders]


def _check_images(found: int, expected: int, images: str, text: str) -> None:
    if found != expected:
        raise ValueError(
            f"{images} holds {found} image{'s' * (found != 1)}, but {text} has {expected} {IMAGE} "
            f"placeholder{'s' * (expected != 1)}; give one image per placeholder"
        )
