"""One sample of a shard -> its row of the index, or the fault for which it is left out."""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from data_pipeline.captions import caption_messages, caption_of_metadata, caption_of_text
from data_pipeline.captions import parse_metadata as parse_json
from data_pipeline.chat import ChatSettings, check_messages, image_names, tokenize_chat
from data_pipeline.decode import check_decodes
from data_pipeline.errors import InputError
from data_pipeline.image_header import read_image_size
from data_pipeline.images import has_image_suffix
from data_pipeline.index.columns import CAPTION_JSON, CAPTION_TEXT, CHAT, RECORD
from data_pipeline.index.prompts import remembering
from data_pipeline.index.sample import CAPTIONED_IMAGE, chat_messages, is_chat, read_record
from data_pipeline.index.tar import Member, SampleMembers
from data_pipeline.records import vocabulary
from data_pipeline.records.values import is_absent
from data_pipeline.storage import ReadAhead
from data_pipeline.tokenizer import Tokenizer

_MAX_TEXT_BYTES = 64 << 20  # far above any conversation; a larger one would stall every reader
_OTHER_MEDIA = frozenset(
    ("mp4", "avi", "mkv", "mov", "webm", "m4v", "mp3", "wav", "flac", "ogg", "m4a", "aac", "opus")
)
_TOLD_BY = frozenset((*vocabulary.TURNS, "question", "questions", "query"))
"""Not "prompt" and the like, which stand beside captions too."""


_Read = tuple[Member, bytes]
"""A member and its bytes."""


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
    """The text member, its bytes, the messages in it, not checked, and the images they show."""

    kind: int
    member: Member
    data: bytes
    messages: Any
    images: Sequence[str] | None


class SampleReader:
    """Makes the rows of one shard; `decode` also decodes every picture, not only its header."""

    def __init__(
        self, reader: ReadAhead, tokenizer: Tokenizer, chat: ChatSettings, decode: bool = False
    ) -> None:
        self._reader, self._tokenizer, self._chat = reader, remembering(tokenizer), chat
        self._decode = decode

    def row(self, key: str, group: SampleMembers) -> Row:
        """The row of the sample with these members; SampleFault if it cannot be used."""
        if group.problem:
            raise SampleFault("unsafe or duplicate members", group.problem)
        if media := [name for name in group.members if _suffix(name) in _OTHER_MEDIA]:
            raise SampleFault(
                "media that is not read",
                f"there is a member {key}.{media[0]}, and only pictures are read; leave it out",
            )
        # Outside: a store that fails says nothing about the sample.
        texts = {
            name: (member, self._read_text(member))
            for name in ("json", "txt")
            if (member := group.find(name)) is not None
        }
        try:
            text = _text(key, group, texts)
            # Checks the messages too, which the rest relies on; `is_chat` has checked a chat's.
            tokens = tokenize_chat(
                text.messages, self._tokenizer, self._chat, checked=text.kind == CHAT
            )
        except SampleFault:
            raise
        except InputError as error:
            raise SampleFault("unusable text", str(error)) from error
        names = image_names(text.messages) if text.images is None else text.images
        images = [self._image(key, group, name) for name in names]
        used = {image.offset for image in images}
        return Row(
            *(text.kind, text.member.offset, text.member.size, zlib.crc32(text.data)),
            *(len(tokens.input_ids), tokens.supervised.count(True)),
            images,
            unused_images=len({group.members[n].offset for n in _pictures(group)} - used),
        )

    def _read_text(self, member: Member) -> bytes:
        if member.size > _MAX_TEXT_BYTES:
            size = f"the text has {member.size} bytes, more than {_MAX_TEXT_BYTES}"
            raise SampleFault("unusable text", size)
        return self._reader.read(member.offset, member.size)

    def _image(self, key: str, group: SampleMembers, name: str) -> ImageRow:
        member = group.find(name)
        if member is None:
            raise SampleFault(
                "missing image",
                f"the messages name an image {name!r}: there is no member {f'{key}.{name}'!a}",
            )
        data = self._reader.read(member.offset, member.size)
        try:
            width, height = read_image_size(data)
            if self._decode:
                check_decodes(data)
        except InputError as error:
            raise SampleFault("unreadable image", f"image {name!r}: {error}") from error
        return ImageRow(member.offset, member.size, zlib.crc32(data), width, height)


def _text(key: str, group: SampleMembers, texts: Mapping[str, _Read]) -> _Text:
    """What is learned from a sample: messages or a record, else a caption in txt or JSON."""
    json, data = texts.get("json", (None, b""))
    txt, content = texts.get("txt"), None
    if json is not None:
        try:
            content = parse_json(data)
        except InputError:
            if txt is None:
                raise
        if content is not None and _is_record(content, alone=txt is None):
            return _of_json(json, data, content, key, group)
    pictures = _plain_pictures(group)
    if json is None and (txt is None or not pictures):
        beside = ", ".join(group.members)
        missing = f"{key}.json" if not pictures else f"{key}.json or {key}.txt"
        dotted = any("." in name for name in group.members)
        unread = [n for n in group.members if f".{_suffix(n)}" in vocabulary.MEDIA_SUFFIXES]
        if unread and not pictures and not _pictures(group):
            raise SampleFault(
                "media that is not read",
                f"a member {key}.{unread[0]} is of a kind that is not read; save it as PNG or JPEG",
            )
        hint = "; a key ends at the first dot of a member's name" if dotted else ""
        raise SampleFault("no text member", f"there is no member {missing} beside {beside}{hint}")
    if not pictures:
        raise InputError(
            'the JSON has no "messages", and there is no image it could be the caption of'
        )
    if len(pictures) > 1:
        raise InputError(f"there is one caption for several images: {', '.join(pictures)}")
    return _caption(txt, texts.get("json"), content, pictures)


def _is_record(content: Mapping[str, Any], alone: bool) -> bool:
    """Whether JSON, alone or beside a caption in txt, is told by turns or a question."""
    said = {str(k).lower() for k, value in content.items() if alone or not is_absent(value)}
    if said & _TOLD_BY:
        return True
    return alone and not said & {*vocabulary.CAPTION} and bool(said & {*vocabulary.QUESTION})


def _caption(
    txt: _Read | None,
    json: _Read | None,
    content: dict[str, Any] | None,
    pictures: Sequence[str],
) -> _Text:
    """The caption in txt, or that in JSON where txt has none that is usable."""
    problem: InputError | None = None
    if txt is not None:
        try:
            messages = caption_messages(CAPTIONED_IMAGE, caption_of_text(txt[1]))
            return _Text(CAPTION_TEXT, *txt, messages, pictures)
        except InputError as error:
            problem = error
    if json is None or content is None:
        assert problem is not None, "one of the members is there"
        raise problem
    try:
        messages = caption_messages(CAPTIONED_IMAGE, caption_of_metadata(content))
    except InputError as error:
        raise problem or error from error
    return _Text(CAPTION_JSON, *json, messages, pictures)


def _of_json(
    member: Member, data: bytes, content: dict[str, Any], key: str, group: SampleMembers
) -> _Text:
    if is_chat(content):
        return _Text(CHAT, member, data, chat_messages(content), None)
    pictures = _pictures(group)
    try:
        record = read_record(content, pictures)
    except InputError:
        if {*content} <= {"messages", "metadata"}:  # our own form: what is wrong by its own rules
            check_messages(chat_messages(content))
        raise
    named = [_member_of(source, key, group, pictures, record.images) for source in record.images]
    return _Text(RECORD, member, data, record.messages, named)


def _member_of(
    source: Any, key: str, group: SampleMembers, pictures: list[str], all_sources: list[Any]
) -> str:
    """The member that a record means by a picture: its suffix, its name, or the only one there."""
    if not isinstance(source, str) or source.startswith("data:"):
        raise InputError("a picture lies inside the JSON; write it as a member of its own")
    name = source.replace("\\", "/").rpartition("/")[2]
    for candidate in (source, name, name.removeprefix(f"{key.rpartition('/')[2]}.")):
        if group.find(candidate) is not None:
            return candidate
    if len(all_sources) == len(pictures) == 1:
        return pictures[0]
    raise SampleFault(
        "missing image",
        f"the record names an image {source[:80]!r}: none of the members "
        f"{', '.join(pictures) or '(there are no pictures)'} is it; name members by their suffix",
    )


def _suffix(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _plain_pictures(group: SampleMembers) -> list[str]:
    """Members such as {key}.jpg, without a name of their own."""
    return [name for name in group.members if "." not in name and has_image_suffix(f".{name}")]


def _pictures(group: SampleMembers) -> list[str]:
    """All members that are pictures by their names, in the order of the tar."""
    return [name for name in group.members if has_image_suffix(f".{name}")]
