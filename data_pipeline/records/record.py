"""A record as people have it -> messages with typed parts, the pictures they show, metadata.

The same for every reader: JSON, parquet, shards in place. What a record says is read, refused by
name (one `InputError`), or kept as metadata; nothing is dropped.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_pipeline.errors import InputError
from data_pipeline.processor.prompt_tokenflex import IMAGE as PLACEHOLDER
from data_pipeline.records import vocabulary
from data_pipeline.records.metadata import metadata_of
from data_pipeline.records.questions import question_turns, text_of
from data_pipeline.records.turns import Picture, Turn, check_switches, read_turns, sources_of
from data_pipeline.records.values import (
    Present,
    describe,
    first_of,
    is_absent,
    only_of,
    present,
    structured,
)

KINDS = {
    "turns": vocabulary.TURNS,
    "question": vocabulary.QUESTION,
    "caption": vocabulary.CAPTION,
}
"""What a record can be told by, and the keys that tell it."""
_OBJECT = re.compile("<bbox>|<ref-object>")
CAPTION_PROMPT = "Describe the image."


@dataclass(frozen=True)
class Record:
    """What a record says.

    messages: turns {"role", "content": parts}, not checked; an image part names its number, "0".
    images: a path, a URL or the file's bytes, in the order in which the messages show them.
    metadata: the keys without content, the record's own `id` among them.
    """

    messages: list[dict[str, Any]]
    images: list[Any]
    metadata: dict[str, Any]


def parse_record(
    record: Any,
    images: Sequence[Any] | None = None,
    renamed: Mapping[str, str] | None = None,
    ignored: Collection[str] = (),
) -> Record:
    """Read a record.

    Args:
        images: the pictures, where they are known from elsewhere; those that it names do not count.
        renamed: key to read -> key in the record, for records whose keys nobody foresaw.
        ignored: keys that are dropped on purpose.

    Raises:
        InputError: what was found, for a record that cannot be read whole.
    """
    if not isinstance(record, Mapping):
        raise InputError(f"the record is {describe(record)}, expected an object")
    record = {key: value for key, value in record.items() if key not in ignored}
    record, spare = _renamed(record, renamed or {})
    held = present(record)
    check_switches(held, "the record")
    kind, key = _kind(record, held)
    named = first_of(held, vocabulary.IMAGES, "the pictures")
    turns = _turns(held, kind, key, record[key])
    _add_system(turns, held)
    if images is None:
        images = _named_images(*named, turns) if named else []
    if kind == "caption" and len(images) != 1:
        raise InputError(f"{key!r} is the caption of one picture, and there are {len(images)}")
    shown = _place(turns, list(images))
    _check_objects(record, turns)
    metadata = spare | metadata_of(held, turns, bool(shown), key)
    messages = [{"role": turn.role, "content": _parts(turn, shown)} for turn in turns]
    return Record(messages, [picture.source for picture in shown], metadata)


def record_kind(record: Mapping[str, Any]) -> tuple[str, str]:
    """(kind, key) that a record is told by; InputError, with the keys, if none or several do."""
    return _kind(record, present(record))


def _kind(record: Mapping[str, Any], held: Present) -> tuple[str, str]:
    found = {}
    for kind, names in KINDS.items():
        if (key := first_of(held, names, "what is said")) is not None:
            found[kind] = key[0]
    if "turns" in found:
        found.pop("caption", None)  # a text beside the turns is theirs, or metadata
        if "question" in found:
            raise InputError(
                f"{found['turns']!r} and {found['question']!r} both hold what is said; leave one "
                "out, or say with --map or --ignore which is meant"
            )
    if "question" in found:
        found.pop("caption", None)
    if not found:
        known = [name for names in KINDS.values() for name in names]
        if empty := [key for key in record if str(key).lower() in known]:
            raise InputError(f"{empty[0]!r} is {describe(record[empty[0]])}: nothing is said")
        keys = ", ".join(map(repr, record)) or "none"
        raise InputError(
            f"the record has the keys {keys[:200]}, expected one of {', '.join(known)}"
        )
    return next(iter(found.items()))


def _renamed(
    record: Mapping[str, Any], renamed: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The record with keys to read in place of its own; and its keys that these stand for."""
    if missing := [key for key in renamed.values() if key not in record]:
        keys = ", ".join(map(repr, record))
        raise InputError(f"--map names {missing[0]!r}, and the record has {keys[:200]}")
    taken = set(renamed.values())
    alike = {n for names in vocabulary.ALIKE if renamed.keys() & {*names} for n in names}
    rest = {key: value for key, value in record.items() if key not in taken}
    spare = {key: value for key, value in rest.items() if str(key).lower() in alike}
    kept = {key: value for key, value in rest.items() if key not in (*renamed, *spare)}
    return {**kept, **{to: record[key] for to, key in renamed.items()}}, spare


def _turns(held: Present, kind: str, key: str, said: Any) -> list[Turn]:
    if kind == "turns":
        return read_turns(said, key)
    if kind == "question":
        return question_turns(held, key, said)
    caption = text_of(only_of(said), key).strip()
    return [Turn("user", [CAPTION_PROMPT]), Turn("assistant", [caption])]


def _named_images(key: str, value: Any, turns: Sequence[Turn]) -> list[Any]:
    """The pictures under a key; empty ones behind the last are padding if the text agrees."""
    value = structured(value)
    if isinstance(value, list | tuple):
        places = sum(item == Picture() for turn in turns for item in turn.items)
        if places and all(map(is_absent, value[places:])):
            value = value[:places]
    return sources_of(value, repr(key))


def _add_system(turns: list[Turn], held: Present) -> None:
    found = first_of(held, vocabulary.SYSTEM, "the system text")
    if found is None:
        return
    text = text_of(found[1], found[0])
    if turns and turns[0].role == "system":
        if turns[0].items == [text]:
            return
        raise InputError(f"{found[0]!r} and the first turn are both the system's; leave one")
    turns.insert(0, Turn("system", [text]))


def _check_objects(record: Mapping[str, Any], turns: list[Turn]) -> None:
    """InputError where texts have the placeholders that ms-swift fills from `objects`."""
    texts = (item for turn in turns for item in turn.items if isinstance(item, str))
    if not is_absent(record.get("objects")) and any(map(_OBJECT.search, texts)):
        raise InputError(
            "the record has 'objects' for <bbox> and <ref-object> in its text, which is not read; "
            "write them into the text"
        )


def _place(turns: list[Turn], images: list[Any]) -> list[Picture]:
    """Fill the placeholders, or put the pictures before the first user turn; returns all."""
    pictures = [item for turn in turns for item in turn.items if isinstance(item, Picture)]
    places = [picture for picture in pictures if picture.source is None]
    own = [picture.source for picture in pictures if picture.source is not None]
    if images and not places and own == images:
        images = []  # the record lists what its turns show
    if images and not pictures:
        user = next((turn for turn in turns if turn.role == "user"), None)
        if user is None:
            raise InputError("there are pictures and no user turn to show them in")
        user.items[:0] = map(Picture, images)
    elif len(places) != len(images):
        raise InputError(
            f"{len(places)} {PLACEHOLDER} in the text for {len(images)} images"
            + (f", beside {len(own)} that the turns name" if own else "")
            + "; write one where each picture goes, or none: then they come first"
        )
    else:
        remaining = iter(images)
        for turn in turns:
            turn.items = [
                Picture(next(remaining)) if item == Picture() else item for item in turn.items
            ]
    return [item for turn in turns for item in turn.items if isinstance(item, Picture)]


def _parts(turn: Turn, shown: list[Picture]) -> list[dict[str, str]]:
    parts = []
    for item in turn.items:
        if isinstance(item, str):
            parts.append({"type": "text", "text": item})
        else:
            number = next(i for i, picture in enumerate(shown) if picture is item)
            parts.append({"type": "image", "image": str(number)})
    return parts
