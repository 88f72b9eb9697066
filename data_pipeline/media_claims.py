"""Text that claims a picture, a video or a sound: one check for every reader of training data.

`<image>` is where a picture goes, as in LLaVA's format; the readers put the pictures there.
Whatever else claims media was written for another trainer, and as plain text it would teach a
model to answer about what it was never shown. What an assistant says is always plain text.
"""

import re

from data_pipeline.errors import InputError
from data_pipeline.processor.prompt_tokenflex import IMAGE as PLACEHOLDER

# Placeholders of other trainers and models; lower case, as they are compared without regard to it.
_CLAIMS = re.compile(
    r"<img>[^<\s]*[./][^<]*</img>"  # Qwen-VL: a path between the tags; without, they are text
    r"|<(?:video|audio|sound|speech|imagehere|point_?cloud|vila/(?:image|video|sound)|mm_(?:image|video)"
    r"|(?:start|end)_of_(?:image|video)|fake_token_around_image|(?:image|im|img)_patch"
    r"|(?:image|img|video)[_-](?:placeholder|pad|token|soft_token))>"
    r"|<(?:image|picture|video|audio)[ _-]?\d+>"  # <image_1>, <image 1>
    r"|<\|(?:(?:begin|end)_of_(?:image|video|audio)|(?:image|video|audio)_(?:start|end)|image|img"
    r"|video|audio|vision_start|vision_end|image_pad|video_pad|vision_pad|image_\d+"
    r"|video_\d+|audio_\d+|audio_bos|audio_eos)\|>"
    r"|\[img\]|<\s*image\s*/?>",
    re.IGNORECASE,
)


def find_claim(text: str) -> str | None:
    """The first thing in a text that claims media, `<image>` included; None if there is none."""
    if "<" not in text and "[" not in text:
        return None
    match = _CLAIMS.search(text)
    return match[0] if match else None


def check_no_claim(text: str, where: str, images: int = 0) -> None:
    """InputError, naming `where` and what it found, if a text claims media.

    images: pictures that the turn shows by parts of their own.
    """
    if (claim := find_claim(text)) is None:
        return
    if claim == PLACEHOLDER:
        raise InputError(
            f"{where} has {text.count(PLACEHOLDER)} {PLACEHOLDER} in the text for {images} images "
            "that are not parts of their own; put each picture in its place, or write it otherwise"
        )
    raise InputError(
        f"{where} claims media by {claim[:80]!r}, which is not read; write {PLACEHOLDER} where a "
        "picture goes, and leave out samples with video or sound"
    )
