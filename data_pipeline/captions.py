"""A caption as a chat sample: what img2dataset shards and folders of captioned images become."""

import codecs
import json
from collections.abc import Mapping
from typing import Any

from data_pipeline.errors import InputError
from data_pipeline.files import LFS_POINTER

PROMPT = "Describe the image."
_CAPTION_KEYS = ("caption", "text")
_BOM = codecs.BOM_UTF8  # some editors put it before UTF-8; the codec "utf-8-sig" is slow


def caption_messages(image_name: str, caption: str) -> list[dict[str, Any]]:
    """The image with `PROMPT` as the user's turn, the caption as the answer."""
    prompt = [{"type": "image", "image": image_name}, {"type": "text", "text": PROMPT}]
    return [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": [{"type": "text", "text": caption}]},
    ]


def caption_of_text(data: bytes) -> str:
    """The caption in a text file, its line ends as one; InputError if not UTF-8, or empty."""
    if data.startswith(LFS_POINTER):
        raise InputError("the caption is a pointer of Git LFS; fetch the file: git lfs pull")
    try:
        return _checked(data.removeprefix(_BOM).decode().replace("\r\n", "\n"))
    except UnicodeDecodeError as error:
        raise InputError(
            f"the caption is not UTF-8 ({error.reason} at byte {error.start})"
        ) from None


def caption_of_json(data: bytes) -> str:
    """The caption in the bytes of {"caption": "..."}; InputError if there is none."""
    return caption_of_metadata(parse_metadata(data))


def parse_metadata(data: bytes) -> dict[str, Any]:
    """The object in a JSON file; InputError if it holds anything else."""
    try:
        content = json.loads(data.removeprefix(_BOM).decode())
    except UnicodeDecodeError as error:
        raise InputError(f"the JSON is not UTF-8 ({error.reason} at byte {error.start})") from None
    except RecursionError:
        raise InputError("the JSON is nested too deeply") from None
    except ValueError as error:  # malformed, or a number of thousands of digits
        raise InputError(f"the JSON does not parse: {error}") from None
    if not isinstance(content, dict):
        raise InputError('the JSON is not an object with "messages" or "caption"')
    return content


def caption_of_metadata(content: Mapping[str, Any]) -> str:
    """The caption in metadata; InputError if there is none, or more than one."""
    found = {key: content[key] for key in content if key.lower() in _CAPTION_KEYS and content[key]}
    texts = [text for value in found.values() for text in _only(value)]
    if len(texts) == 1:
        return _checked(texts[0])
    if lists := [text for text in found.values() if isinstance(text, list)]:
        raise InputError(
            f'"caption" is a list of {len(lists[0])}, expected one text; write one picture for each'
        )
    raise InputError(f'the JSON has {len(texts) or "no"} text as "caption" or "text"')


def _only(value: Any) -> list[str]:
    """A text, alone or in a list of one."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return [value] if isinstance(value, str) else []


def _checked(caption: str) -> str:
    if not caption.strip():
        raise InputError("the caption is empty")
    return caption.strip()
