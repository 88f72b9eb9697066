"""The text member of a sample: a chat or a record as JSON, or a caption as img2dataset has it."""

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
from data_pipeline.index.columns import CAPTION_JSON, CAPTION_TEXT, CHAT
from data_pipeline.records import Record, parse_record
from data_pipeline.storage import Shard, Storage

CAPTIONED_IMAGE = "image"
"""Name of the one image in the messages that are made of a caption."""


def sample_of(kind: int, data: bytes, images: int) -> dict[str, Any]:
    """{"messages", "metadata"} of a text member; InputError if it is not of that kind.

    images: how many the sample has.
    """
    if kind == CAPTION_TEXT:
        messages = caption_messages(CAPTIONED_IMAGE, caption_of_text(data))
        return {"messages": messages, "metadata": {}}
    content = parse_metadata(data)
    if kind == CAPTION_JSON:
        messages = caption_messages(CAPTIONED_IMAGE, caption_of_metadata(content))
        return {"messages": messages, "metadata": content}
    if kind == CHAT:
        messages = chat_messages(content)
        check_messages(messages)
        return {"messages": messages, "metadata": content.get("metadata", {})}
    record = read_record(content, [str(number) for number in range(images)])
    return {"messages": record.messages, "metadata": record.metadata}


def is_chat(content: dict[str, Any]) -> bool:
    """Whether a JSON member is in this project's own form: typed parts, and no other content."""
    if not {*content} <= {"messages", "metadata"}:
        return False
    try:
        check_messages(content["messages"])
    except InputError:
        return False
    return True


def chat_messages(content: dict[str, Any]) -> Any:
    """The messages, not checked, of a JSON member that has them; InputError for bad metadata."""
    if not isinstance(content.get("metadata", {}), dict):
        raise InputError(f'"metadata" is a {type(content["metadata"]).__name__}, not an object')
    return content["messages"]


def read_record(content: dict[str, Any], images: list[str]) -> Record:
    """A record whose pictures are members beside it.

    images: the members, for a record that does not name them.
    """
    try:
        record = parse_record(content)
    except InputError:
        if not images:
            raise
        return parse_record(content, images)
    return record if record.images or not images else parse_record(content, images)


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
