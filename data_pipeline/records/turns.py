"""The turns of a record, in any of the usual forms, as items: stretches of text and pictures."""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.errors import InputError
from data_pipeline.processor.prompt_tokenflex import IMAGE as PLACEHOLDER
from data_pipeline.records import vocabulary


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


Present = Mapping[str, list[tuple[Any, Any]]]
"""The keys of an object that hold something; see `present`."""

_WATCHED = frozenset((*vocabulary.LOSS, *vocabulary.MEDIA, *vocabulary.UNREAD))
_OF_TURNS = frozenset((*vocabulary.ROLE, *vocabulary.CONTENT, *vocabulary.IMAGES, *vocabulary.LOSS))


def is_absent(value: Any) -> bool:
    """Whether a value says that there is nothing: null, NaN, "", an empty list or object."""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str | bytes | list | tuple | dict) and not value)


def present(record: Mapping[Any, Any]) -> Present:
    """Key in lower case -> (key, value) of all keys of that name that hold something."""
    held: dict[str, list[tuple[Any, Any]]] = {}
    for key, value in record.items():
        if not is_absent(value):
            held.setdefault(str(key).lower(), []).append((key, value))
    return held


def first_of(held: Present, names: Collection[str], what: str) -> tuple[str, Any] | None:
    """(key, value) of the one of these keys that is there; None if none is.

    InputError, naming them, if several are.
    """
    found = held.keys() & names
    if not found:
        return None
    entries = [entry for name in held if name in found for entry in held[name]]
    if len(entries) > 1:
        raise InputError(
            f"{' and '.join(repr(key) for key, _ in entries)} both hold {what}; leave one of them, "
            "or say with --map which is meant"
        )
    return entries[0]


def read_turns(turns: Any, key: str) -> list[Turn]:
    """The turns under `key`; InputError, with the number of the turn, for what cannot be read."""
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
        for name in ("bytes", "url", "path", "image", "image_url", "file_name"):
            if not is_absent(value.get(name)):
                return sources_of(value[name], where)
        raise InputError(f"{where} is an object with {sorted(map(str, value))}, expected a picture")
    if isinstance(value, list | tuple):
        empty = [number for number, entry in enumerate(value) if is_absent(entry)]
        if empty:
            raise InputError(f"{where}: picture {empty[0]} of {len(value)} is empty")
        return [source for entry in value for source in _one(entry, where)]
    raise InputError(f"{where} is {describe(value)}, expected a file name, a URL or bytes")


def describe(value: Any) -> str:
    """The kind of a value, for a message."""
    if value is None:
        return "null"
    return "empty" if is_absent(value) else f"of type {type(value).__name__}"


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
            raise InputError(
                f"{where} has {key!r}, which is not read: what it says would be missing; write it "
                "into the turns, or leave the sample out"
            )


def _one(entry: Any, where: str) -> list[Any]:
    if isinstance(entry, list | tuple):
        raise InputError(f"{where} is a list of lists; give one list of pictures")
    return sources_of(entry, where)


def _switches(value: Any) -> bool:
    """Whether a value of the loss's keys asks for anything but learning from all; NaN does not."""
    if isinstance(value, bool | int | float):
        return value != 1 and not is_absent(value)
    return isinstance(value, list | tuple) and any(map(_switches, value))


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
    content = first_of(held, vocabulary.CONTENT, f"the content of {where}")
    items = list(_content(content[1], role, where)) if content else []
    named = first_of(held, vocabulary.IMAGES, f"the pictures of {where}")
    if named:
        items = _with_own(items, sources_of(named[1], f"{where}: {named[0]!r}"), where)
    rest = [entry for name in held if name not in _OF_TURNS for entry in held[name]]
    return Turn(role, items, dict(rest))


def _role(held: Present, where: str) -> str:
    found = first_of(held, vocabulary.ROLE, f"the role of {where}")
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
        yield from _split(content, role)
    elif isinstance(content, list | tuple):
        for part in content:
            yield from _part(part, role, where)
    elif isinstance(content, Mapping):
        yield from _part(content, role, where)
    else:
        raise InputError(f"{where} has a content {describe(content)}, expected a text or parts")


def _part(part: Any, role: str, where: str) -> Iterator[str | Picture]:
    """A text or picture of a typed content: OpenAI's, transformers', TRL's, Qwen's."""
    if isinstance(part, str):
        yield from _split(part, role)
        return
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind is None and isinstance(part, Mapping):  # Qwen-VL: {"text": ...} or {"image": ...}
        kind = next((k for k in ("text", "image", "image_url") if not is_absent(part.get(k))), None)
    if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
        yield from _split(part["text"], role)
    elif kind in ("image", "image_url", "input_image"):
        named = {k: v for k, v in part.items() if k in (*vocabulary.IMAGES, "url", "path")}
        sources = [s for v in named.values() for s in sources_of(v, f"{where}: its picture")]
        if len(sources) > 1:
            raise InputError(f"{where} has a part with {len(sources)} pictures; give one a part")
        yield Picture(*sources)
    else:
        raise InputError(
            f"{where} has a part of type {str(kind)[:40]!r}, expected text or image: video, sound "
            "and tools are not read"
        )


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
