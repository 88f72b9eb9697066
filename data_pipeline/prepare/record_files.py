"""Files of records: JSON, JSON lines, parquet, CSV; one bad line or file does not end the rest."""

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import InputError
from data_pipeline.storage import Storage

# Rows with their images are held at once so many at a time.
BATCH_ROWS = 32
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
TABLE_SUFFIXES = (".parquet", ".csv", ".tsv")
SUFFIXES = (*JSON_SUFFIXES, *TABLE_SUFFIXES)
_PACKED = (".gz", ".zip", ".xz", ".zst", ".bz2", ".tar", ".tgz")


@dataclass(frozen=True)
class Entry:
    """A record, or why it cannot be read; `where` is its place in the file, `number` from 0."""

    where: str
    number: int
    value: Any = None
    fault: InputError | None = None


@dataclass(frozen=True)
class RemoteTable:
    """A parquet file behind a URL; read where it lies, a block at a time."""

    url: str
    storage: Storage

    def __str__(self) -> str:
        return self.url


def find_tables(url: str, storage: Storage) -> list[RemoteTable]:
    """The parquet files that a URL means: one, a pattern, or a folder and all below it.

    InputError if there is none, or the store cannot be listed.
    """
    is_one = url.lower().endswith(".parquet") and "*" not in url
    pattern = url if "*" in url else f"{url.rstrip('/')}/**/*.parquet"
    urls = [url] if is_one else storage.glob(pattern)
    if not urls:
        raise InputError(f"{url} holds no parquet file, and only those are read from a URL")
    return [RemoteTable(found, storage) for found in urls]


def read_entries(path: Path | RemoteTable) -> Iterator[Entry]:
    """The records of a file, in order; what cannot be read comes as an entry with its fault.

    Raises:
        InputError: the file is missing, of another kind, or JSON that does not parse as a whole.
    """
    if isinstance(path, RemoteTable):
        return _parquet_rows(path)
    if not path.is_file():
        raise InputError(f"{path} is not a file; expected one of {', '.join(SUFFIXES)}")
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet_rows(path)
    if suffix in (".csv", ".tsv"):
        return _csv_rows(path, "," if suffix == ".csv" else "\t")
    if suffix in JSON_SUFFIXES:
        return _json_entries(path, suffix)
    advice = "; unpack it first" if suffix in _PACKED else ""
    raise InputError(f"{path} is no file of records: expected one of {', '.join(SUFFIXES)}{advice}")


def count_entries(path: Path | RemoteTable) -> int | None:
    """Number of records, where the file tells it at once; None if not, or if it is damaged."""
    if isinstance(path, Path) and path.suffix.lower() != ".parquet":
        return None
    try:
        with open_parquet(path) as file:
            return int(file.metadata.num_rows)
    except InputError:
        return None


def open_parquet(path: Path | RemoteTable) -> Any:
    """The ParquetFile; close it. InputError if it cannot be read, or pyarrow is missing."""
    try:
        import pyarrow.parquet  # only those who convert parquet need to have it
    except ImportError as error:
        raise InputError(
            "parquet is read with the package pyarrow, which is not installed; run: pip install "
            "pyarrow"
        ) from error
    try:
        if isinstance(path, RemoteTable):
            return pyarrow.parquet.ParquetFile(path.storage.open(path.url))
        return pyarrow.parquet.ParquetFile(path, memory_map=True)
    except (OSError, pyarrow.ArrowException) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path | RemoteTable, error: Exception) -> InputError:
    return InputError(
        f"{path} cannot be read as parquet ({str(error).splitlines()[0]}); fetch it again, or take "
        "it out of the folder"
    )


def _parquet_rows(path: Path | RemoteTable) -> Iterator[Entry]:
    number = 0
    try:
        file = open_parquet(path)
    except InputError as error:
        if isinstance(error.__cause__, ImportError):
            raise
        yield Entry("the file", 0, fault=error)
        return
    import pyarrow

    with file:
        try:
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                for row in range(batch.num_rows):
                    yield _parquet_row(batch, row, number)
                    number += 1
        except (OSError, pyarrow.ArrowException) as error:
            yield Entry(f"row {number} and all behind it", number, fault=_unreadable(path, error))


def _parquet_row(batch: Any, row: int, number: int) -> Entry:
    where = f"row {number}"
    try:
        columns = zip(batch.schema.names, batch.columns, strict=True)
        return Entry(where, number, {name: column[row].as_py() for name, column in columns})
    except UnicodeDecodeError as error:
        text = f"a text is not UTF-8: {error.reason} at byte {error.start}"
        return Entry(where, number, fault=InputError(text))


def _csv_rows(path: Path, delimiter: str) -> Iterator[Entry]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter, restkey="", strict=True)
        number = 0
        while True:
            where = f"row {number}"
            try:
                row = next(reader, None)
            except (csv.Error, UnicodeDecodeError) as error:
                fault = InputError(f"{path}:{reader.line_num}: not CSV in UTF-8: {error}")
                yield Entry(f"{where} and all behind it", number, fault=fault)
                return
            if row is None:
                return
            if row.pop("", None):
                fault = InputError(f"{path}:{reader.line_num}: more cells than the header has")
                yield Entry(where, number, fault=fault)
            else:
                yield Entry(where, number, row)
            number += 1


def _json_entries(path: Path, suffix: str) -> Iterator[Entry]:
    """A list, or an object per line; which of them the content says, not the name."""
    with path.open("rb") as file:
        start = file.read(4096)
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{path} is in UTF-16, expected UTF-8; save it again in UTF-8")
    listed = start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    if listed and (suffix == ".json" or _is_list(path)):
        return _listed(path)
    return _listed(path) if suffix == ".json" and not _is_lines(path) else _lines(path)


def _listed(path: Path) -> Iterator[Entry]:
    entries = _load(path)
    if isinstance(entries, Mapping) and len(entries) == 1 and isinstance(_only(entries), list):
        entries = _only(entries)  # {"data": [...]}
    if not isinstance(entries, list):
        raise InputError(
            f"{path}:1:1: holds one JSON {type(entries).__name__}, expected a list of entries"
        )
    return (Entry(f"entry {number}", number, entry) for number, entry in enumerate(entries))


def _only(mapping: Mapping[str, Any]) -> Any:
    return next(iter(mapping.values()))


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}:{error.lineno}:{error.colno}: not JSON: {error.msg}. Is the file complete?"
        ) from error
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        raise InputError(f"{path}: not JSON in UTF-8: {error}") from error


def _is_list(path: Path) -> bool:
    try:
        return isinstance(_load(path), list)
    except InputError:
        return False


def _is_lines(path: Path) -> bool:
    """Whether the first line is an object of its own with another one behind it."""
    with path.open("rb") as file:
        lines = (line for line in file if line.strip())
        first, second = next(lines, b""), next(lines, b"")
    try:
        json.loads(first.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return False
    return second.lstrip().startswith(b"{")


def _lines(path: Path) -> Iterator[Entry]:
    with path.open("rb") as file:
        number = 0
        for line_number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"entry {number}"
            try:
                yield Entry(where, number, json.loads(line.decode("utf-8-sig")))
            except json.JSONDecodeError as error:
                text = f"{path}:{line_number}:{error.colno}: not JSON: {error.msg}"
                yield Entry(where, number, fault=InputError(text))
            except (UnicodeDecodeError, RecursionError, ValueError) as error:
                text = f"{path}:{line_number}: not JSON in UTF-8: {error}"
                yield Entry(where, number, fault=InputError(text))
            number += 1
