"""The text member of a sample: a chat as JSON, or a caption as img2dataset writes it."""

import zlib
from collections.abc import Sequence
from typing import Any

from data_pipeline.captions import (
    caption_messages,
    caption_of_metadata,
    caption_of_text,
    parse_metadata,
)
from data_pipeline.chat import check_messages
from data_pipeline.errors import InputError
from data_pipeline.index.columns import CAPTION_JSON, CAPTION_TEXT
from data_pipeline.storage import Shard, Storage

CAPTIONED_IMAGE = "image"
"""Name of the one image in the messages that are made of a caption."""


def sample_of(kind: int, data: bytes) -> dict[str, Any]:
    """{"messages", "metadata"} of a text member; InputError if it is not of that kind."""
    if kind == CAPTION_TEXT:
        caption, metadata = caption_of_text(data), {}
    else:
        metadata = parse_metadata(data)
        if kind != CAPTION_JSON:
            messages = chat_messages(metadata)
            check_messages(messages)
            return {"messages": messages, "metadata": metadata.get("metadata", {})}
        caption = caption_of_metadata(metadata)
    return {"messages": caption_messages(CAPTIONED_IMAGE, caption), "metadata": metadata}


def chat_messages(content: dict[str, Any]) -> Any:
    """The messages, not checked, of a JSON member that has them; InputError for bad metadata."""
    if not isinstance(content.get("metadata", {}), dict):
        raise InputError(f'"metadata" is a {type(content["metadata"]).__name__}, not an object')
    return content["messages"]


def read_checked(
    storage: Storage, shard: Shard, members: Sequence[tuple[int, int, int]]
) -> list[bytes]:
    """The bytes of members by offset, size and CRC-32; InputError if they have others."""
    found = storage.read_together(shard, [(offset, size) for offset, size, _ in members])
    for data, (offset, size, crc) in zip(found, members, strict=True):
        if zlib.crc32(data) != crc:
            raise InputError(
                f"the {size} bytes at {offset} of {shard} are not those that were indexed; index "
                "again"
            )
    return found
