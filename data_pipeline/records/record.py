"""A record as people have it -> messages with typed parts, the pictures they show, metadata.

The same for every reader: JSON, parquet, shards in place. What a record says is read, refused by
name (one `InputError`), or kept as metadata; nothing is dropped.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_pipeline.errors import InputError
from data_pipeline.processor.prompt_tokenflex import IMAGE as PLACEHOLDER
from data_pipeline.records import vocabulary
from data_pipeline.records.turns import (
    Picture,
    Present,
    Turn,
    check_switches,
    describe,
    first_of,
    present,
    read_turns,
    sources_of,
)

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
KINDS = {
    "turns": vocabulary.TURNS,
    "question": vocabulary.QUESTION,
    "caption": vocabulary.CAPTION,
}
"""What a record can be told by, and the keys that tell it."""
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
    record = _renamed({k: v for k, v in record.items() if k not in ignored}, renamed or {})
    held = present(record)
    check_switches(held, "the record")
    kind, key = _kind(record, held)
    named = first_of(held, vocabulary.IMAGES, "the pictures")
    if images is None:
        images = sources_of(named[1], repr(named[0])) if named else []
    turns = {"turns": _of_turns, "question": _of_question, "caption": _of_caption}[kind](
        held, key, record[key], len(images)
    )
    _add_system(turns, held)
    metadata = _metadata(held, turns, bool(images), key)
    shown = _place(turns, list(images))
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


def _renamed(record: Mapping[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    if missing := [key for key in renamed.values() if key not in record]:
        keys = ", ".join(map(repr, record))
        raise InputError(f"--map names {missing[0]!r}, and the record has {keys[:200]}")
    taken = set(renamed.values())
    rest = {key: value for key, value in record.items() if key not in taken | renamed.keys()}
    return {**rest, **{to: record[key] for to, key in renamed.items()}}


def _of_turns(held: Present, key: str, turns: Any, images: int) -> list[Turn]:
    return read_turns(turns, key)


def _of_question(held: Present, key: str, asked: Any, images: int) -> list[Turn]:
    if isinstance(asked, list | tuple):  # TRL: prompt and completion are turns
        found = first_of(held, vocabulary.ANSWER, "the answer")
        return read_turns([*asked, *(found[1] if found else ())], key)
    question = _text(asked, key)
    more = first_of(held, vocabulary.MORE_QUESTION, "more of the question")
    if more:
        question = f"{question}\n{_text(more[1], more[0])}"
    choices = first_of(held, vocabulary.CHOICES, "the choices")
    options = _options(choices[1], choices[0]) if choices else []
    answer = _answer(held, options)
    lines = [f"{_LETTERS[number]}. {option}" for number, option in enumerate(options)]
    turns = [{"role": "user", "content": "\n".join([question, *lines])}]
    return read_turns([*turns, {"role": "assistant", "content": answer}], key)


def _of_caption(held: Present, key: str, said: Any, images: int) -> list[Turn]:
    if images != 1:
        raise InputError(f"{key!r} is the caption of one picture, and there are {images}")
    caption = _text(said, key).strip()
    return [Turn("user", [CAPTION_PROMPT]), Turn("assistant", [caption])]


def _answer(held: Present, options: list[str]) -> str:
    found = first_of(held, vocabulary.ANSWER, "the answer")
    if found is None:
        found = first_of(held, vocabulary.ANSWERS, "the answers")
        if found is None:
            raise InputError(f"there is no answer: expected one of {', '.join(vocabulary.ANSWER)}")
        given = found[1] if isinstance(found[1], list | tuple) else [found[1]]
        texts = [entry.get("answer") if isinstance(entry, Mapping) else entry for entry in given]
        answer: Any = Counter(map(str, texts)).most_common(1)[0][0]
    else:
        answer = found[1]
    if options:
        return _letter(answer, options)
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise InputError(f"{found[0]!r} is {describe(answer)}, expected a text")
    return str(answer)


def _letter(answer: Any, options: list[str]) -> str:
    """The letter of the option that an answer names by number (from 0), letter or text."""
    number = answer if isinstance(answer, int) and not isinstance(answer, bool) else None
    if isinstance(answer, str) and answer in options:
        number = options.index(answer)
    elif isinstance(answer, str) and answer.strip("(). ").upper() in _LETTERS[: len(options)]:
        number = _LETTERS.index(answer.strip("(). ").upper() or "?")
    elif isinstance(answer, str) and answer.isdigit():
        number = int(answer)
    if number is None or not 0 <= number < len(options):
        raise InputError(f"the answer {str(answer)[:40]!r} is none of the {len(options)} choices")
    return _LETTERS[number]


def _options(choices: Any, key: str) -> list[str]:
    if isinstance(choices, Mapping):
        choices = list(choices.values())
    if not isinstance(choices, list | tuple) or not 2 <= len(choices) <= len(_LETTERS):
        raise InputError(f"{key!r} is {describe(choices)}, expected a list of 2 to 26 choices")
    return [_text(choice, key) for choice in choices]


def _text(value: Any, key: str) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise InputError(f"{key!r} is {describe(value)}, expected a text")
    return value


def _add_system(turns: list[Turn], held: Present) -> None:
    found = first_of(held, vocabulary.SYSTEM, "the system text")
    if found is None:
        return
    text = _text(found[1], found[0])
    if turns and turns[0].role == "system":
        if turns[0].items == [text]:
            return
        raise InputError(f"{found[0]!r} and the first turn are both the system's; leave one")
    turns.insert(0, Turn("system", [text]))


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


_READ = frozenset(
    (
        *(*vocabulary.TURNS, *vocabulary.QUESTION, *vocabulary.ANSWER, *vocabulary.CHOICES),
        *(*vocabulary.IMAGES, *vocabulary.SYSTEM, *vocabulary.LOSS, *vocabulary.MORE_QUESTION),
        *(*vocabulary.MEDIA, *vocabulary.UNREAD),
    )
)
"""Keys that are read or refused; the others are metadata."""


def _metadata(
    held: Present, turns: Sequence[Turn], has_images: bool, told_by: str
) -> dict[str, Any]:
    """The keys without content; InputError for one whose value names media that nothing shows."""
    kept: dict[str, Any] = {}
    read = _READ | {told_by.lower()}
    for name, key, value in [(n, *entry) for n in held if n not in read for entry in held[n]]:
        if holds_bytes(value) or (not has_images and names_media(value)):
            raise InputError(
                f"the record has {key!r}, which is or names media that no turn shows; give --map "
                f"image={key} if it is the picture, or --ignore {key}"
            )
        if name == "metadata" and isinstance(value, Mapping):
            kept |= value
        else:
            kept[str(key)] = value
    if more := {str(i): turn.metadata for i, turn in enumerate(turns) if turn.metadata}:
        kept["turns"] = more
    return kept


def holds_bytes(value: Any) -> bool:
    """Whether a value is or holds bytes, as a file would."""
    if isinstance(value, Mapping):
        return any(map(holds_bytes, value.values()))
    return isinstance(value, bytes) or (
        isinstance(value, list | tuple) and any(map(holds_bytes, value))
    )


def names_media(value: Any) -> bool:
    """Whether a value names a file of a picture, a video or a sound."""
    if isinstance(value, str):
        short = value[:2048].lower()
        return short.startswith("data:image/") or (
            len(value) < 2048 and "\n" not in short and short.endswith(vocabulary.MEDIA_SUFFIXES)
        )
    if isinstance(value, Mapping):
        return any(map(names_media, value.values()))
    return isinstance(value, list | tuple) and any(map(names_media, value))
