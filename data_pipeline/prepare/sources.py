"""What a source holds, told by its content: records, captioned images, a list of datasets."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import InputError
from data_pipeline.images import has_image_suffix
from data_pipeline.prepare.entries import Entry, RemoteTable, record_suffix
from data_pipeline.prepare.folder import CAPTION_SUFFIXES
from data_pipeline.prepare.from_records import what_they_hold
from data_pipeline.prepare.json_records import is_list_of_datasets
from data_pipeline.prepare.record_files import (
    ARROW_SUFFIXES,
    CSV_SUFFIXES,
    JSON_SUFFIXES,
    OF_DATASETS,
    SUFFIXES,
    arrow_files,
    find_tables,
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
    told, begun = what_they_hold(files, renamed)
    return Found(RECORDS, files, f"{what}{told}", passed, begun)


def _of_folder(source: Path, kind: str | None, renamed: Mapping[str, str] | None) -> Found:
    files, passed = walk(source, lambda path: True)
    images = {p.with_suffix("") for p in files if has_image_suffix(p.name)}
    captioned = [
        path
        for path in files
        if path.suffix.lower() in CAPTION_SUFFIXES and {path.with_suffix(""), path} & images
    ]
    candidates = _tables(files, source)
    if captioned and kind is None:
        candidates[f"{len(captioned)} captions beside images"] = []
    if (not captioned or kind == RECORDS) and not any(
        path.name.lower() in _METADATA for path in files
    ):
        candidates |= _loose(files, source)
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
            f"{source} may be read as {' or as '.join(candidates)}; name the one, or give --format"
        )
    what, chosen = next(iter(candidates.items()))
    if not chosen:
        return Found(FOLDER, [], what)
    for path in sorted({*files} - {*chosen}):
        if not (chosen[0].name.lower() in _METADATA and has_image_suffix(path.name)):
            passed.add(path, source)
    return _records(chosen, f"{what}, ", renamed, passed)


def _tables(files: Sequence[Path], source: Path) -> dict[str, list[Path]]:
    """An ImageFolder, parquet files, or what `datasets` saved to disk: a folder for each split."""
    if metadata := [path for path in files if path.name.lower() in _METADATA]:
        return {f"an ImageFolder ({metadata[0].name})": metadata}
    found: dict[str, list[Path]] = {}
    if parquet := [path for path in files if path.suffix.lower() == ".parquet"]:
        found[f"{len(parquet)} parquet files"] = parquet
    folders = {path.parent for path in files if path.suffix.lower() in ARROW_SUFFIXES}
    for folder in sorted(folders):
        arrow = arrow_files(folder)
        where = f" in {folder.relative_to(source)}" if len(folders) > 1 else ""
        found[f"{len(arrow)} Arrow files{where}"] = arrow
    return found


def _loose(files: Sequence[Path], source: Path) -> dict[str, list[Path]]:
    """Files of JSON or CSV; those whose names differ by numbers only are parts of one."""
    parts: dict[str, list[Path]] = {}
    for path in files:
        if record_suffix(path) in (*JSON_SUFFIXES, *CSV_SUFFIXES) and path.name not in OF_DATASETS:
            name = path.relative_to(source).as_posix()
            parts.setdefault(re.sub(r"\d+", "#", name), []).append(path)
    return {
        f"records in {paths[0].relative_to(source)}"
        + (f" and {len(paths) - 1} like it" if paths[1:] else ""): paths
        for paths in parts.values()
    }


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
    return is_list_of_datasets(content)
