"""What a source holds, told by its content: records, captioned images, a list of datasets."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import InputError
from data_pipeline.images import has_image_suffix
from data_pipeline.prepare.folder import CAPTION_SUFFIXES
from data_pipeline.prepare.from_records import what_it_holds
from data_pipeline.prepare.record_files import (
    JSON_SUFFIXES,
    SUFFIXES,
    Entry,
    RemoteTable,
    find_tables,
    read_entries,
)
from data_pipeline.storage import Storage
from data_pipeline.walk import PassedOver, walk

RECORDS, FOLDER, MIXTURE = "records", "folder", "mixture"
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""Files with which an ImageFolder of Hugging Face datasets names its pictures."""


@dataclass(frozen=True)
class Found:
    """kind: `RECORDS`, `FOLDER` or `MIXTURE`; files: of records; what: for people.

    begun: all records of the first file, which is open already.
    """

    kind: str
    files: Sequence[Path] | Sequence[RemoteTable]
    what: str
    passed: PassedOver | None = None
    begun: Iterator[Entry] | None = None


def find_source(
    source: Path | str,
    kind: str | None = None,
    renamed: Mapping[str, str] | None = None,
    storage: Storage | None = None,
) -> Found:
    """What a file, a folder or, if it is a string, a URL holds.

    kind: what it is known to hold; None: told by its content.

    Raises:
        InputError: nothing that is read, or several things: then they are listed.
    """
    if isinstance(source, str):
        if kind not in (None, RECORDS):
            raise InputError(f"{source}: only records are read from a URL; download it first")
        tables = find_tables(source, storage or Storage())
        return _records(tables, f"{len(tables)} parquet files, ", renamed)
    if kind == FOLDER:
        return Found(FOLDER, [], "images with captions beside them")
    if source.is_file():
        return _of_file(source, kind, renamed)
    if not source.is_dir():
        raise InputError(f"{source} is not a file or folder that exists")
    return _of_folder(source, kind, renamed)


def _of_file(source: Path, kind: str | None, renamed: Mapping[str, str] | None) -> Found:
    if kind == MIXTURE or (kind is None and is_mixture(source)):
        return Found(MIXTURE, [source], "a list of datasets")
    return _records([source], "", renamed)


def _records(
    files: Sequence[Path] | Sequence[RemoteTable],
    what: str,
    renamed: Mapping[str, str] | None,
    passed: PassedOver | None = None,
) -> Found:
    told, begun = what_it_holds(read_entries(files[0]), renamed)
    return Found(RECORDS, files, f"{what}records of {told or 'no known keys'}", passed, begun)


def _of_folder(source: Path, kind: str | None, renamed: Mapping[str, str] | None) -> Found:
    files, passed = walk(source, lambda path: True)
    parquet = [path for path in files if path.suffix.lower() == ".parquet"]
    metadata = [path for path in files if path.name.lower() in _METADATA]
    loose = [p for p in files if p.suffix.lower() in JSON_SUFFIXES and p not in metadata]
    images = {p.with_suffix("") for p in files if has_image_suffix(p.name)}
    captioned = [
        path
        for path in files
        if path.suffix.lower() in CAPTION_SUFFIXES and {path.with_suffix(""), path} & images
    ]
    candidates: dict[str, list[Path]] = {}
    if metadata:
        candidates[f"an ImageFolder ({metadata[0].name})"] = metadata
    elif parquet:
        candidates[f"{len(parquet)} parquet files"] = parquet
    if captioned and kind is None:
        candidates[f"{len(captioned)} captions beside images"] = []
    if not captioned and not metadata and loose:
        for path in loose:
            candidates[f"records in {path.relative_to(source)}"] = [path]
    if not candidates:
        suffixes = ", ".join(sorted({path.suffix.lower() or "no suffix" for path in files}))
        shards = ": shards, which python -m data_pipeline.index takes as they are"
        raise InputError(
            f"{source} holds nothing that is read: no {', '.join(SUFFIXES)} and no captioned images"
            f" among {len(files)} files ({suffixes or 'none'}"
            f"{shards if '.tar' in suffixes.split(', ') else ''})"
        )
    if len(candidates) > 1:
        raise InputError(
            f"{source} may be read as {' or as '.join(candidates)}; name the file, or give --format"
        )
    what, chosen = next(iter(candidates.items()))
    if not chosen:
        return Found(FOLDER, [], what)
    for path in sorted({*files} - {*chosen}):
        if not (metadata and has_image_suffix(path.name)):
            passed.add(path, source)
    return _records(chosen, f"{what}, ", renamed, passed)


def is_mixture(path: Path) -> bool:
    """Whether a file is InternVL's list of datasets (.json) or LLaVA-NeXT's (.yaml)."""
    if path.suffix.lower() in (".yaml", ".yml"):
        return True
    if path.suffix.lower() != ".json" or path.stat().st_size > 1 << 20:
        return False
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return False
    return (
        isinstance(content, dict)
        and bool(content)
        and all(isinstance(entry, dict) and "annotation" in entry for entry in content.values())
    )
