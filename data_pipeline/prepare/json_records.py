"""Records in JSON: a list, an object per line, one record, or an object that holds records."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_pipeline.errors import InputError
from data_pipeline.prepare.entries import (
    UNPACKING_ERRORS,
    Entry,
    incomplete,
    open_packed,
    start_of,
)
from data_pipeline.records import record_kind

_BOM = b"\xef\xbb\xbf"
_NO_RECORDS = ("licenses", "categories", "info", "videos")
"""Lists of COCO's and VQA's files beside those of records."""


def json_entries(path: Path, suffix: str) -> Iterator[Entry]:
    """The records of a file; which form they are in the content says, not the name."""
    listed = start_of(path).removeprefix(_BOM).lstrip().startswith(b"[")
    if listed and (suffix == ".json" or _is_list(path)):
        return _whole(path)
    return _whole(path) if suffix == ".json" and not _is_lines(path) else _lines(path)


def is_list_of_datasets(content: Any) -> bool:
    """Whether JSON is InternVL's list of datasets, {name: {"annotation": file, ...}}."""
    return (
        isinstance(content, dict)
        and bool(content)
        and all(isinstance(entry, dict) and "annotation" in entry for entry in content.values())
    )


def _whole(path: Path) -> Iterator[Entry]:
    try:
        records = _records(_load(path))
    except _Form as form:
        raise InputError(f"{path}:1:1: holds {form}") from None
    return (Entry(f"entry {number}", number, entry) for number, entry in enumerate(records))


class _Form(Exception):
    """JSON that is no list of records; the text says what it is, and what to do."""


def _records(content: Any) -> list[Any]:
    if isinstance(content, list):
        return content
    if not isinstance(content, Mapping):
        raise _Form(f"one JSON {type(content).__name__}, expected a list of entries")
    if is_list_of_datasets(content):
        raise _Form("a list of datasets, no records; give --format mixture")
    lists = {k: v for k, v in content.items() if isinstance(v, list) and k not in _NO_RECORDS}
    if "annotations" in lists and len(lists) == 2:
        for other, of in (("images", ("id",)), ("questions", ("question_id",))):
            if other in lists:
                return _joined(lists["annotations"], lists[other], other, *of)
    if [*lists] == ["questions"] or _lacks_questions(lists):
        raise _Form(
            f"VQA's {next(iter(lists))} without the other half; join questions and annotations by "
            "question_id, and write a list of image, question and answer"
        )
    if _is_record(content):
        return [content]
    if len(lists) == 1:
        return next(iter(lists.values()))
    if content and all(isinstance(entry, Mapping) for entry in content.values()):
        return [_with_id(key, entry) for key, entry in content.items()]
    keys = ", ".join(map(repr, content))[:200] or "none"
    raise _Form(
        f"one JSON dict with the keys {keys}, expected a list of entries, or an object that "
        "holds one list, or an entry under each id; write the entries as a list"
    )


def _lacks_questions(lists: Mapping[str, list[Any]]) -> bool:
    first = next(iter(lists.get("annotations", ())), None)
    return isinstance(first, Mapping) and "question_id" in first and "question" not in first


def _is_record(content: Mapping[str, Any]) -> bool:
    try:
        key = record_kind(content)[1]
    except InputError:
        return False
    said = content[key]
    alike = [value for value in content.values() if type(value) is type(said)]
    if isinstance(said, Mapping) or (
        isinstance(said, list) and len(alike) > 1 and not isinstance(said[0], Mapping)
    ):
        raise _Form(
            "columns, as pandas writes them; write records: to_json(..., orient='records', "
            "lines=True)"
        )
    return True


def _joined(annotations: list[Any], others: list[Any], what: str, key: str) -> list[Any]:
    """COCO's captions with the names of their pictures, VQA's answers with their questions."""
    by_id = {entry.get(key): entry for entry in others if isinstance(entry, Mapping)}
    joined = []
    for annotation in annotations:
        if not isinstance(annotation, Mapping):
            joined.append(annotation)
            continue
        other = by_id.get(annotation.get("image_id" if what == "images" else key), {})
        if what == "images":
            other = {"image": other["file_name"]} if other.get("file_name") else {}
        joined.append({**other, **annotation})
    return joined


def _with_id(key: str, entry: Mapping[str, Any]) -> Mapping[str, Any]:
    return entry if "id" in entry else {"id": key, **entry}


def _load(path: Path) -> Any:
    try:
        with open_packed(path) as file:
            return json.loads(file.read().decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}:{error.lineno}:{error.colno}: not JSON: {error.msg}. Is the file complete?"
        ) from error
    except InputError:
        raise
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        raise InputError(f"{path}: not JSON in UTF-8: {error}") from error
    except UNPACKING_ERRORS as error:
        raise incomplete(path, error) from error


def _is_list(path: Path) -> bool:
    try:
        return isinstance(_load(path), list)
    except InputError:
        return False


def _is_lines(path: Path) -> bool:
    """Whether the first line is an object of its own with another one behind it."""
    with open_packed(path) as file:
        lines = (line for line in file if line.strip())
        try:
            first, second = next(lines, b""), next(lines, b"")
            if not second.lstrip().startswith(b"{"):
                return False
            json.loads(first.decode("utf-8-sig"))
        except (ValueError, RecursionError, *UNPACKING_ERRORS):
            return False
    return True


def _lines(path: Path) -> Iterator[Entry]:
    number = 0
    try:
        with open_packed(path) as file:
            for line_number, line in enumerate(file, start=1):
                if line.strip():
                    yield _of_line(line, number, f"{path}:{line_number}")
                    number += 1
    except UNPACKING_ERRORS as error:
        yield Entry(f"entry {number} and all behind it", number, fault=incomplete(path, error))


def _of_line(line: bytes, number: int, place: str) -> Entry:
    where = f"entry {number}"
    try:
        return Entry(where, number, json.loads(line.decode("utf-8-sig")))
    except json.JSONDecodeError as error:
        text = f"{place}:{error.colno}: not JSON: {error.msg}"
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        text = f"{place}: not JSON in UTF-8: {error}"
    return Entry(where, number, fault=InputError(text))
