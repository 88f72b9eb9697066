"""One sample of a shard -> its row of the index, or the fault for which it is left out."""

import zlib
from typing import Any, NamedTuple

from data_pipeline.captions import (
    caption_messages,
    caption_of_metadata,
    caption_of_text,
    parse_metadata,
)
from data_pipeline.chat import ChatSettings, image_names, tokenize_chat
from data_pipeline.errors import InputError
from data_pipeline.index.columns import CAPTION_JSON, CAPTION_TEXT, CHAT
from data_pipeline.index.image_header import read_image_size
from data_pipeline.index.prompts import remembering
from data_pipeline.index.sample import CAPTIONED_IMAGE, chat_messages
from data_pipeline.index.tar import Member, SampleMembers
from data_pipeline.storage import ReadAhead
from data_pipeline.tokenizer import Tokenizer

_MAX_TEXT_BYTES = 64 << 20  # far above any conversation; a larger one would stall every reader
_IMAGE_SUFFIXES = frozenset(("jpg", "jpeg", "png", "webp"))  # that img2dataset writes


class SampleFault(InputError):
    """A sample cannot be used; `fault` is the kind of it, for the summary."""

    def __init__(self, fault: str, reason: str) -> None:
        super().__init__(reason)
        self.fault = fault


class ImageRow(NamedTuple):
    """Offset, bytes and CRC-32 of an image, its size in pixels."""

    offset: int
    bytes: int
    crc: int
    width: int
    height: int


class Row(NamedTuple):
    """A usable sample; see data_pipeline/index/columns.py."""

    kind: int
    text_offset: int
    text_size: int
    text_crc: int
    text_tokens: int
    supervised_tokens: int
    images: list[ImageRow]
    unused_images: int


class _Text(NamedTuple):
    """The text member, its bytes, and the messages in it, not checked."""

    kind: int
    member: Member
    data: bytes
    messages: Any


class SampleReader:
    """Makes the rows of one shard."""

    def __init__(self, reader: ReadAhead, tokenizer: Tokenizer, chat: ChatSettings) -> None:
        self._reader, self._tokenizer, self._chat = reader, remembering(tokenizer), chat

    def row(self, key: str, group: SampleMembers) -> Row:
        """The row of the sample with these members; SampleFault if it cannot be used."""
        if group.problem:
            raise SampleFault("unsafe or duplicate members", group.problem)
        try:
            text = self._text(key, group)
            # Checks the messages too, which the rest relies on.
            tokens = tokenize_chat(text.messages, self._tokenizer, self._chat)
        except SampleFault:
            raise
        except InputError as error:
            raise SampleFault("unusable text", str(error)) from error
        pictures = _plain_images(group)
        names = image_names(text.messages) if text.kind == CHAT else pictures
        images = [self._image(key, group, name) for name in names]
        return Row(
            *(text.kind, text.member.offset, text.member.size, zlib.crc32(text.data)),
            *(len(tokens.input_ids), sum(tokens.supervised)),
            images,
            unused_images=len(_images(group) - set(names)),
        )

    def _text(self, key: str, group: SampleMembers) -> _Text:
        """What is learned from a sample: messages, else the caption in txt, else that in JSON."""
        json, txt, pictures = group.members.get("json"), group.members.get("txt"), None
        data, content = b"", None
        if json is not None:
            data = self._read_text(json)
            content = parse_metadata(data)
            if "messages" in content:
                return _Text(CHAT, json, data, chat_messages(content))
        pictures = _plain_images(group)
        if json is None and (txt is None or not pictures):
            beside = ", ".join(group.members)
            missing = f"{key}.json" if not pictures else f"{key}.json or {key}.txt"
            raise SampleFault("no text member", f"there is no member {missing} beside {beside}")
        if not pictures:
            raise InputError(
                'the JSON has no "messages", and there is no image it could be the caption of'
            )
        if len(pictures) > 1:
            raise InputError(f"there is one caption for several images: {', '.join(pictures)}")
        if txt is not None:
            data = self._read_text(txt)
            messages = caption_messages(CAPTIONED_IMAGE, caption_of_text(data))
            return _Text(CAPTION_TEXT, txt, data, messages)
        assert json is not None and content is not None, "one of the members is there"
        messages = caption_messages(CAPTIONED_IMAGE, caption_of_metadata(content))
        return _Text(CAPTION_JSON, json, data, messages)

    def _read_text(self, member: Member) -> bytes:
        if member.size > _MAX_TEXT_BYTES:
            raise InputError(f"the text has {member.size} bytes, more than {_MAX_TEXT_BYTES}")
        return self._reader.read(member.offset, member.size)

    def _image(self, key: str, group: SampleMembers, name: str) -> ImageRow:
        member = group.members.get(name)
        if member is None:
            raise SampleFault(
                "missing image",
                f"the messages name an image {name!r}: there is no member {key}.{name!a}",
            )
        data = self._reader.read(member.offset, member.size)
        try:
            width, height = read_image_size(data)
        except InputError as error:
            raise SampleFault("unreadable image", f"image {name!r}: {error}") from error
        return ImageRow(member.offset, member.size, zlib.crc32(data), width, height)


def _plain_images(group: SampleMembers) -> list[str]:
    """Members such as {key}.jpg, without a name of their own."""
    return [name for name in group.members if name.lower() in _IMAGE_SUFFIXES]


def _images(group: SampleMembers) -> set[str]:
    return {n for n in group.members if n.rpartition(".")[2].lower() in _IMAGE_SUFFIXES}
