"""What stands in a record beside its content: kept, unless it is or names media."""

from collections.abc import Mapping, Sequence
from typing import Any

from data_pipeline.errors import InputError
from data_pipeline.records import vocabulary
from data_pipeline.records.turns import Turn
from data_pipeline.records.values import Present

_READ = frozenset(
    (
        *(*vocabulary.TURNS, *vocabulary.QUESTION, *vocabulary.ANSWER, *vocabulary.CHOICES),
        *(*vocabulary.IMAGES, *vocabulary.SYSTEM, *vocabulary.LOSS, *vocabulary.MORE_QUESTION),
        *(*vocabulary.MEDIA, *vocabulary.UNREAD),
    )
)
"""Keys that are read or refused; the others are metadata."""
_OF_PICTURES = ("image", "img", "picture", "photo", "screenshot")
"""A text or number under a key that begins so tells of a picture: image_id, imgname, imageURL."""


def metadata_of(
    held: Present, turns: Sequence[Turn], has_images: bool, told_by: str
) -> dict[str, Any]:
    """The keys without content; InputError for one whose value names media that nothing shows."""
    kept: dict[str, Any] = {}
    read = _READ | {told_by.lower()}
    if told_by.lower() in vocabulary.TURNS:  # a question lists them; turns say what they say
        read -= {*vocabulary.CHOICES}
    for name, key, value in [(n, *entry) for n in held if n not in read for entry in held[n]]:
        _check_shown(key, value, has_images or name in vocabulary.CHOICES, "the record")
        if name == "metadata" and isinstance(value, Mapping):
            kept |= value
        else:
            kept[str(key)] = value
    for number, turn in enumerate(turns):
        for key, value in turn.metadata.items():
            _check_shown(key, value, False, f"turn {number}")
    if more := {str(i): turn.metadata for i, turn in enumerate(turns) if turn.metadata}:
        kept["turns"] = more
    return kept


def check_others(metadata: Mapping[str, Any], shown: Sequence[Any]) -> None:
    """InputError for a key such as image2 that names a picture beside those that are shown."""
    names = {_file_name(source) for source in shown if isinstance(source, str)}
    if not names or len(names) < len({*map(str, shown)}):
        return  # none, or the names of some are not known
    for key, value in metadata.items():
        tells = key.lower().startswith(_OF_PICTURES) and isinstance(value, str)
        if tells and names_media(value) and _file_name(value) not in names:
            raise InputError(
                f"the record has {key!r}, which names a picture that no turn shows; write all of "
                f"them as a list under 'image', or --ignore {key}"
            )


def _file_name(source: str) -> str:
    return source.replace("\\", "/").rpartition("/")[2]


def _check_shown(key: Any, value: Any, has_images: bool, where: str) -> None:
    tells = str(key).lower().startswith(_OF_PICTURES) and _is_name(key, value)
    if holds_bytes(value) or (not has_images and (tells or names_media(value))):
        raise InputError(
            f"{where} has {key!r}, which is or names media that no turn shows; give --map "
            f"image={key} if it is the picture, or --ignore {key}"
        )


def _is_name(key: Any, value: Any) -> bool:
    is_id = isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, str) or (is_id and str(key).lower().endswith("id"))


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
