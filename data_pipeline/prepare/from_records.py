"""Files of records as people have them -> shards: LLaVA's, messages, questions, captions."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from data_pipeline.chat import check_sample
from data_pipeline.draw import uniform_hash
from data_pipeline.errors import InputError
from data_pipeline.prepare.convert import Candidate, Conversion, Sample, Unwanted, convert
from data_pipeline.prepare.entries import Entry, RemoteTable
from data_pipeline.prepare.picture_sources import find_picture, member_suffix
from data_pipeline.prepare.record_files import ARROW_SUFFIXES, count_entries, read_entries
from data_pipeline.records import Record, check_others, parse_record, record_kind
from data_pipeline.walk import PassedOver

RELEVANCE = "relevance_min"


@dataclass(frozen=True)
class Share:
    """A part of a file's records: the first, last or random ones; a fraction, or so many."""

    which: str
    amount: float
    is_fraction: bool

    def __str__(self) -> str:
        amount = f"{100 * self.amount:g}%" if self.is_fraction else f"{self.amount:g}"
        return f"{self.which}:{amount}"

    def numbers(self, total: int) -> frozenset[int]:
        """The numbers, out of 0 .. total - 1, of the records that belong to it."""
        size = math.ceil(self.amount * total) if self.is_fraction else int(self.amount)
        order = np.arange(total)
        if self.which == "random":
            order = np.argsort(uniform_hash(0, "share of records", order), kind="stable")
        chosen = order[-size:] if self.which == "end" and size else order[:size]
        return frozenset(chosen.tolist())


_LOOKED_AT = 20  # records of a file, and files, that tell what a source holds
_FILES_LOOKED_AT = 8
_TABLES = (".parquet", *ARROW_SUFFIXES)  # rows are named by their place, not by an id


def prepare_records(
    files: Sequence[Path] | Sequence[RemoteTable],
    out: Path,
    *,
    source: Path | str,
    format: str = "records",
    images: Path | None = None,
    renamed: Mapping[str, str] | None = None,
    ignored: Sequence[str] = (),
    min_relevance: int | None = None,
    share: Share | None = None,
    begun: Iterator[Entry] | None = None,
    passed_over: PassedOver | None = None,
    conversion: Conversion,
) -> dict[str, Any]:
    """Convert files of records into shards in `out`; returns the report.

    What records say is read by `data_pipeline.records`, which lists the keys. Records that cannot
    be used are left out, counted by reason and named with file and place.

    Args:
        files: JSON, JSON lines, parquet or CSV, read one after the other.
        source: what the user named: a file, the folder of the files, or a URL; format: as what.
        images: the folder that pictures are named from; each local file's own folder if None.
        renamed, ignored: see `parse_record`.
        min_relevance: leave out records whose `relevance_min` is below; those without stay.
        share: only these records of each file.
        begun: all records of the first file, where it was opened already.
        passed_over: files of the source that are not read, for the report.

    Raises:
        InputError: a folder or file is missing or does not parse, nothing is usable, or `out` may
            not be written.
    """
    if images is not None and not images.is_dir():
        raise InputError(f"the image folder {images} does not exist; name it with --images")
    counts = [count_entries(path) for path in files]
    read = partial(_build, renamed=renamed or {}, ignored=ignored, min_relevance=min_relevance)
    return convert(
        _candidates([(_inner(path, source), path) for path in files], images, read, share, begun),
        out,
        total=sum(filter(None, counts)) if None not in counts else None,
        sources=[source, *([images] if images else [])],
        conversion=conversion,
        settings={
            "format": format,
            "source": str(source),
            "files": len(files),
            "min_relevance": min_relevance,
            "images_in": str(images) if images else None,
            "share": str(share) if share else None,
            "map": dict(renamed or {}),
            "ignore": list(ignored),
        },
        passed_over=passed_over,
    )


def what_they_hold(
    files: Sequence[Path] | Sequence[RemoteTable], renamed: Mapping[str, str] | None = None
) -> tuple[str, Iterator[Entry]]:
    """What files hold, "records of turns (under 'messages')"; and all records of the first.

    The first records tell it, and are read only once. Of many files some are looked at; what most
    hold is said, and how many do not. InputError if there is one file and it does not parse.
    """
    looked = files[:: max(1, len(files) // _FILES_LOOKED_AT)][:_FILES_LOOKED_AT]
    first, begun = _look(looked[0], renamed or {}, len(files) == 1)
    told = [first, *(_look(path, renamed or {}, alone=False)[0] for path in looked[1:])]
    most = max(told, key=lambda what: (what is not None, told.count(what)))
    odd = [path for path, what in zip(looked, told, strict=True) if what != most]
    but = f"; {len(odd)} of {len(looked)} files looked at hold others, as {odd[0]}" if odd else ""
    return f"records of {most or 'no known keys'}{but}", begun


def _look(
    path: Path | RemoteTable, renamed: Mapping[str, str], alone: bool
) -> tuple[str | None, Iterator[Entry]]:
    """What the first records of a file are told by, None if nothing; and all its records."""
    entries = _entries(path, alone)
    first = list(islice(entries, _LOOKED_AT))
    told = (_told_by(entry.value, renamed) for entry in first)
    return next(filter(None, told), None), chain(first, entries)


def _told_by(record: Any, renamed: Mapping[str, str]) -> str | None:
    if not isinstance(record, Mapping):
        return None
    try:
        kind, key = record_kind({**record, **{to: record.get(key) for to, key in renamed.items()}})
    except InputError:
        return None
    return f"{kind} (under {key!r})"


def _inner(path: Path | RemoteTable, source: Path | str) -> PurePosixPath:
    """What tells a file from the others: its path in the folder, or its URL."""
    if isinstance(path, RemoteTable):
        return PurePosixPath(path.url.partition("://")[2])
    root = Path(source)
    return PurePosixPath(path.relative_to(root if root.is_dir() else root.parent))


def _candidates(
    files: Sequence[tuple[PurePosixPath, Path | RemoteTable]],
    images: Path | None,
    read: Any,
    share: Share | None,
    begun: Iterator[Entry] | None,
) -> Iterator[Candidate]:
    """The records of files by their names."""
    alone = len(files) == 1
    for inner, path in files:
        beside = path.parent if isinstance(path, Path) else None
        # The end of a long path tells more, and the number must not be cut off.
        stem = inner.with_suffix("").as_posix()[-54:]
        chosen = share.numbers(sum(1 for _ in _entries(path, alone))) if share else None
        entries, begun = begun or _entries(path, alone), None
        for entry in entries:
            if chosen is not None and entry.number not in chosen:
                yield Candidate(entry.where, partial(_leave_out, f"sampling_strategy {share}"))
                continue
            name = f"{stem}_{entry.number:08d}" if inner.suffix.lower() in _TABLES else None
            label = entry.where if alone and name is None else f"{inner}, {entry.where}"
            own = entry.value.get("id") if isinstance(entry.value, Mapping) else None
            label += f" (id {own!r:.80})" if own is not None else ""
            yield Candidate(label, partial(read, entry, name, images or beside))


def _entries(path: Path | RemoteTable, alone: bool) -> Iterator[Entry]:
    """The records of a file; one file of several that cannot be read is a fault among others."""
    try:
        yield from read_entries(path)
    except InputError as error:
        if alone:
            raise
        yield Entry("the file", 0, fault=error)


def _build(
    entry: Entry,
    name: str | None,
    folder: Path | None,
    *,
    renamed: Mapping[str, str],
    ignored: Sequence[str],
    min_relevance: int | None,
) -> Sample:
    """A sample from one entry, its images not yet read."""
    if entry.fault is not None:
        raise entry.fault
    if isinstance(entry.value, Mapping) and min_relevance is not None:
        _check_relevance(entry.value.get(RELEVANCE), min_relevance)
    record = parse_record(entry.value, renamed=renamed, ignored=ignored)
    check_others(record.metadata, record.images)
    pictures = [_picture(source, number, folder) for number, source in enumerate(record.images)]
    suffixes = [_suffix(number, picture) for number, picture in enumerate(pictures)]
    messages = _with_suffixes(record, suffixes)
    check_sample(messages)
    own = record.metadata.get("id")
    return Sample(
        name=name or (f"{entry.number:08d}" if own is None else str(own)),
        messages=messages,
        images=dict(zip(suffixes, pictures, strict=True)),
        metadata={**record.metadata, "entry": entry.number},
    )


def _leave_out(option: str) -> Sample:
    raise Unwanted(option)


def _check_relevance(rating: Any, least: int) -> None:
    if rating is None:
        return
    try:
        rated = float(rating)
    except (TypeError, ValueError):
        raise InputError(f"{RELEVANCE!r} is {rating!r:.40}, expected a number") from None
    if rated < least:
        raise Unwanted(f"--min-relevance {least}")


def _picture(source: Any, number: int, folder: Path | None) -> Path | bytes:
    try:
        return find_picture(source, folder)
    except InputError as error:
        raise InputError(f"image {number}: {error}") from error


def _suffix(number: int, picture: Path | bytes) -> str:
    try:
        return member_suffix(number, picture)
    except InputError as error:
        raise InputError(f"image {number}: {error}") from error


def _with_suffixes(record: Record, suffixes: Sequence[str]) -> list[dict[str, Any]]:
    """The messages, their images by the names of the members: "0" becomes "0.jpg"."""
    return [
        {
            "role": turn["role"],
            "content": [
                {"type": "image", "image": suffixes[int(part["image"])]}
                if part["type"] == "image"
                else part
                for part in turn["content"]
            ],
        }
        for turn in record.messages
    ]
