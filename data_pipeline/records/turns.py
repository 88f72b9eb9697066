"""The turns of a record, in any of the usual forms, as items: stretches of text and pictures."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.errors import InputError
from data_pipeline.processor.prompt_tokenflex import IMAGE as PLACEHOLDER
from data_pipeline.records import vocabulary
from data_pipeline.records.values import (
    Present,
    describe,
    first_of,
    is_absent,
    present,
    structured,
)


@dataclass(frozen=True)
class Picture:
    """A picture's place: `source` is a path, a URL or the file's bytes; None for a placeholder."""

    source: Any = None


_PLACE = Picture()


@dataclass
class Turn:
    """A turn: role, its texts and pictures in order, and what else stood beside them."""

    role: str
    items: list[str | Picture]
    metadata: dict[str, Any] = field(default_factory=dict)


_SWITCHED_OFF = re.compile(r"false|no|off|(?!1\.?0*$)\d*\.?\d+", re.IGNORECASE).fullmatch
_SOURCES = ("bytes", "url", "path", "image", "image_url", "file_name", "data", "base64", "source")
"""Keys of an object that is a picture; the first that holds something counts."""
_TEXT_PARTS = ("text", "input_text", "output_text")
_IMAGE_PARTS = ("image", "image_url", "input_image")
_OF_A_PLACEHOLDER = frozenset(("detail", "id", "mime_type", "media_type"))
_WATCHED = frozenset((*vocabulary.LOSS, *vocabulary.MEDIA, *vocabulary.UNREAD))
_OF_TURNS = frozenset((*vocabulary.ROLE, *vocabulary.CONTENT, *vocabulary.IMAGES, *vocabulary.LOSS))


def read_turns(turns: Any, key: str) -> list[Turn]:
    """The turns under `key`; InputError, with the number of the turn, for what cannot be read."""
    turns = structured(turns)
    if not isinstance(turns, list | tuple) or not turns:
        raise InputError(f"{key!r} is {describe(turns)}, expected a list of turns")
    if missing := [number for number, turn in enumerate(turns) if turn is None]:
        raise InputError(f"turn {missing[0]} of {len(turns)} is null")
    if all(isinstance(t, Mapping) and {"user", "assistant"} <= t.keys() for t in turns):
        return [turn for number, pair in enumerate(turns) for turn in _pair(pair, number)]
    return [_turn(turn, f"turn {number}") for number, turn in enumerate(turns)]


def sources_of(value: Any, where: str) -> list[Any]:
    """The pictures that a value names: str or bytes each; InputError for anything else."""
    if is_absent(value):
        return []
    if isinstance(value, str | bytes):
        return [value]
    if isinstance(value, Mapping):
        for name in _SOURCES:
            if not is_absent(value.get(name)):
                return sources_of(value[name], where)
        raise InputError(f"{where} is an object with {sorted(map(str, value))}, expected a picture")
    if isinstance(value, list | tuple):
        empty = [number for number, entry in enumerate(value) if is_absent(entry)]
        if empty:
            raise InputError(f"{where}: picture {empty[0]} of {len(value)} is empty")
        return [source for entry in value for source in _one(entry, where)]
    raise InputError(f"{where} is {describe(value)}, expected a file name, a URL or bytes")


def check_switches(held: Present, where: str) -> None:
    """InputError for a key that switches off or weighs what is learned, or that is not read."""
    watched = [(name, *entry) for name in held if name in _WATCHED for entry in held[name]]
    for name, key, value in watched:
        if name in vocabulary.LOSS and _switches(value):
            raise InputError(
                f"{where} has {key!r}: {str(value)[:40]}, but every assistant turn is learned "
                "from, weighted by train.loss_weighting; leave the sample or the key out"
            )
        if name in vocabulary.MEDIA:
            raise InputError(f"{where} has {key!r}, and only pictures are read; leave it out")
        if name in vocabulary.UNREAD:
            behind = f" (--map input={key} puts it behind a question)" if _is_read_as(name) else ""
            raise InputError(
                f"{where} has {key!r}, which is not read: what it says would be missing; write it "
                f"into the turns{behind}, or drop it with --ignore {key}"
            )


def _one(entry: Any, where: str) -> list[Any]:
    if isinstance(entry, list | tuple):
        raise InputError(f"{where} is a list of lists; give one list of pictures")
    return sources_of(entry, where)


def _switches(value: Any) -> bool:
    """Whether a value of the loss's keys asks for anything but learning from all; NaN does not."""
    if isinstance(value, str):  # a cell of a table
        return _SWITCHED_OFF(value.strip()) is not None
    if isinstance(value, bool | int | float):
        return value != 1 and not is_absent(value)
    return isinstance(value, list | tuple) and any(map(_switches, value))


def _is_read_as(name: str) -> bool:
    return name in ("context", "passage", "hint")


def _pair(pair: Mapping[str, Any], number: int) -> Iterator[Turn]:
    """FineVision's and The Cauldron's turns: {"user", "assistant"}."""
    rest = {k: v for k, v in pair.items() if k not in ("user", "assistant") and not is_absent(v)}
    check_switches(present(rest), f"turn {number}")
    for role in ("user", "assistant"):
        text = pair[role]
        if not isinstance(text, str) and not is_absent(text):
            raise InputError(f"turn {number}: {role!r} is {describe(text)}, expected a text")
        items = list(_split(text, role)) if not is_absent(text) else []
        yield Turn(role, items, rest if role == "user" else {})


def _turn(turn: Any, where: str) -> Turn:
    if not isinstance(turn, Mapping):
        raise InputError(f"{where} is {describe(turn)}, expected an object with role and content")
    held = present(turn)
    check_switches(held, where)
    role = _role(held, where)
    content = first_of(held, vocabulary.CONTENT, f"the content of {where}", "")
    items = list(_content(content[1], role, where)) if content else []
    named = first_of(held, vocabulary.IMAGES, f"the pictures of {where}", "")
    if named:
        items = _with_own(items, sources_of(named[1], f"{where}: {named[0]!r}"), where)
    rest = [entry for name in held if name not in _OF_TURNS for entry in held[name]]
    return Turn(role, items, dict(rest))


def _role(held: Present, where: str) -> str:
    found = first_of(held, vocabulary.ROLE, f"the role of {where}", "")
    name = found[1] if found else None
    role = vocabulary.ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise InputError(
            f"{where} has the role {str(name)[:40]!r}, expected one of "
            f"{', '.join(vocabulary.ROLES)}"
        )
    return role


def _content(content: Any, role: str, where: str) -> Iterator[str | Picture]:
    if isinstance(content, str):
        content = _parts_in(content)
    if isinstance(content, str):
        yield from _split(content, role)
    elif isinstance(content, list | tuple):
        for part in content:
            yield from _part(part, role, where)
    elif isinstance(content, Mapping):
        yield from _part(content, role, where)
    else:
        raise InputError(f"{where} has a content {describe(content)}, expected a text or parts")


def _parts_in(text: str) -> Any:
    """The typed parts that a column of strings holds as JSON; any other text as it is."""
    parts = structured(text) if '"type"' in text or "'type'" in text else text
    if isinstance(parts, list) and all(
        isinstance(part, Mapping) and part.get("type") in (*_TEXT_PARTS, *_IMAGE_PARTS)
        for part in parts
    ):
        return parts
    return text


def _part(part: Any, role: str, where: str) -> Iterator[str | Picture]:
    """A text or picture of a typed content: OpenAI's, transformers', TRL's, Qwen's."""
    if isinstance(part, str):
        yield from _split(part, role)
        return
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind is None and isinstance(part, Mapping):  # Qwen-VL: {"text": ...} or {"image": ...}
        kind = next((k for k in ("text", "image", "image_url") if not is_absent(part.get(k))), None)
    if kind in (*_TEXT_PARTS, *_IMAGE_PARTS):
        check_switches(present(part), where)
    if kind in _TEXT_PARTS and isinstance(part.get("text"), str):
        yield from _split(part["text"], role)
    elif kind in _IMAGE_PARTS:
        yield _picture({k: v for k, v in part.items() if not is_absent(v)}, where)
    elif kind in _TEXT_PARTS:
        raise InputError(f"{where} has a text part with {_keys(part)}, expected 'text' and a text")
    else:
        raise InputError(
            f"{where} has a part of type {str(kind)[:40]!r}, expected text or image: video, sound "
            "and tools are not read"
        )


def _picture(part: Mapping[str, Any], where: str) -> Picture:
    named = {k: v for k, v in part.items() if k in (*vocabulary.IMAGES, *_SOURCES)}
    sources = [source for v in named.values() for source in sources_of(v, f"{where}: its picture")]
    if len(sources) > 1:
        raise InputError(f"{where} has a part with {len(sources)} pictures; give one a part")
    others = {k: v for k, v in part.items() if k not in ("type", "text") and isinstance(v, str)}
    if not sources and others.keys() - _OF_A_PLACEHOLDER:
        raise InputError(
            f"{where} has an image part with {_keys(part)}, expected 'image', 'url', 'path' or none"
        )
    return Picture(*sources)


def _keys(part: Mapping[str, Any]) -> str:
    return ", ".join(repr(key) for key, value in part.items() if not is_absent(value))


def _split(text: str, role: str) -> Iterator[str | Picture]:
    """The text cut at its placeholders; an assistant's is plain text."""
    if role == "assistant":
        yield text
        return
    for number, stretch in enumerate(text.split(PLACEHOLDER)):
        if number:
            yield Picture()
        if stretch:
            yield stretch


def _with_own(items: list[str | Picture], sources: list[Any], where: str) -> list[str | Picture]:
    """The turn's own pictures at its placeholders, or before its text where there are none."""
    places = items.count(_PLACE)
    if not places:
        return [*map(Picture, sources), *items]
    if places != len(sources):
        raise InputError(
            f"{where} has {places} {PLACEHOLDER} in its text and {len(sources)} pictures of its own"
        )
    remaining = iter(sources)
    return [Picture(next(remaining)) if item == _PLACE else item for item in items]
