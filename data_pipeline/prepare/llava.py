"""The LLaVA instruction format: a list of conversations in JSON, and a folder of images."""

import json
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from data_pipeline.chat import check_messages
from data_pipeline.errors import InputError
from data_pipeline.prepare.convert import Candidate, Sample, convert, member_suffix
from data_pipeline.prepare.shard_writer import ShardLimits

ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
PLACEHOLDER = "<image>"


def prepare_llava(
    source: Path,
    out: Path,
    *,
    images: Path | None = None,
    limits: ShardLimits | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Convert a LLaVA file into shards in `out`; returns the report.

    An entry is {"id", "image": str | [str, ...] | absent, "conversations": [{"from": "human" |
    "gpt" | "system", "value": "..<image>.."}]}. Texts are kept as they are, cut at the
    placeholders. Faulty entries are skipped and reported.

    Args:
        source: .jsonl with an entry per line, otherwise a JSON list.
        images: the folder that "image" is relative to; the folder of `source` if None.

    Raises:
        InputError: the file does not parse or is no list (with the position), the folder is
            missing, nothing is usable, or `out` may not be written.
    """
    folder = source.parent if images is None else images
    if not folder.is_dir():
        raise InputError(f"the image folder {folder} does not exist; name it with --images.")
    if not source.is_file():
        raise InputError(f"{source} is not a file; expected a .json or .jsonl in LLaVA's format.")
    total = None
    entries: Iterator[Any]
    if source.suffix == ".jsonl":
        entries = _read_lines(source)
    else:
        listed = _read_list(source)
        entries, total = iter(listed), len(listed)
    return convert(
        (_candidate(number, entry, folder) for number, entry in enumerate(entries)),
        out,
        total=total,
        sources=(source, folder),
        limits=limits or ShardLimits(),
        overwrite=overwrite,
        settings={"format": "llava", "source": str(source)},
    )


def _read_list(source: Path) -> list[Any]:
    try:
        entries = json.loads(source.read_bytes().decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise InputError(
            f"{source}:{error.lineno}:{error.colno}: not JSON: {error.msg}. Is the file complete? "
            "A file with an entry per line has to be named .jsonl."
        ) from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{source}: not JSON in UTF-8: {error}") from error
    if not isinstance(entries, list):
        raise InputError(
            f"{source}:1:1: holds one JSON {type(entries).__name__}, expected a list of entries"
        )
    return entries


def _read_lines(source: Path) -> Iterator[Any]:
    with source.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield json.loads(line.decode("utf-8-sig"))
            except json.JSONDecodeError as error:
                raise InputError(
                    f"{source}:{number}:{error.colno}: not JSON: {error.msg}. Is the file "
                    "complete? A .jsonl file has one entry in each line."
                ) from error
            except (UnicodeDecodeError, RecursionError) as error:
                raise InputError(f"{source}:{number}: not JSON in UTF-8: {error}") from error


def _candidate(number: int, entry: Any, folder: Path) -> Candidate:
    name = entry.get("id") if isinstance(entry, Mapping) else None
    label = f"entry {number}" if name is None else f"entry {number} (id {name!r:.80})"
    return Candidate(label, partial(_build, number, entry, folder))


def _build(number: int, entry: Any, folder: Path) -> Sample:
    """A sample from one entry, its images not yet read."""
    if not isinstance(entry, Mapping):
        raise InputError(f"a JSON {type(entry).__name__} instead of an object")
    paths = [_image_path(image, folder) for image in _image_names(entry)]
    suffixes = [member_suffix(number, path) for number, path in enumerate(paths)]
    turns = entry.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise InputError('"conversations" is missing, empty or not a list')
    placeholders = sum(_text_of(turn).count(PLACEHOLDER) for turn in turns)
    if placeholders != len(paths):
        raise InputError(f"{placeholders} {PLACEHOLDER} in the text for {len(paths)} image files")
    remaining = iter(suffixes)
    messages = [
        {"role": _role_of(turn), "content": _parts(_text_of(turn), remaining)} for turn in turns
    ]
    check_messages(messages)
    if messages[-1]["role"] != "assistant":
        raise InputError("the last turn is not gpt's, so there is no answer to learn")
    name = entry.get("id")
    return Sample(
        name=f"{number:08d}" if name is None else str(name),
        messages=messages,
        images=dict(zip(suffixes, paths, strict=True)),
    )


def _image_names(entry: Mapping[str, Any]) -> list[str]:
    images = entry.get("image")
    if images is None:
        return []
    images = images if isinstance(images, list) else [images]
    if not all(isinstance(image, str) and image for image in images):
        raise InputError('"image" is neither a file name nor a list of file names')
    return images


def _image_path(name: str, folder: Path) -> Path:
    """The path of an image that must lie in `folder`; links inside it may lead elsewhere."""
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise InputError(f"the image {name!r} leads out of the image folder {folder}")
    return folder / relative


def _role_of(turn: Mapping[str, Any]) -> str:
    speaker = turn.get("from")
    if not isinstance(speaker, str) or speaker not in ROLES:
        raise InputError(f'a turn is "from" {speaker!r:.80}, expected one of {", ".join(ROLES)}')
    return ROLES[speaker]


def _text_of(turn: Any) -> str:
    if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
        raise InputError('a turn is not an object with a text as "value"')
    return str(turn["value"])


def _parts(text: str, suffixes: Iterator[str]) -> list[dict[str, str]]:
    """Content parts in order: an image for each placeholder, and the texts around them."""
    parts = []
    for piece in re.split(f"({re.escape(PLACEHOLDER)})", text):
        if piece == PLACEHOLDER:
            parts.append({"type": "image", "image": next(suffixes)})
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts
