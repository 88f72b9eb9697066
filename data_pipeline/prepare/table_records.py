"""Records in tables: parquet, Arrow as Hugging Face datasets saves it, CSV and TSV."""

import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.errors import InputError
from data_pipeline.prepare.entries import (
    UNPACKING_ERRORS,
    Entry,
    RemoteTable,
    incomplete,
    open_packed,
    start_of,
)

# Rows with their images are held at once so many at a time.
BATCH_ROWS = 32


def open_parquet(path: Path | RemoteTable) -> Any:
    """The ParquetFile; close it. InputError if it cannot be read, or pyarrow is missing."""
    try:
        import pyarrow.parquet  # only those who convert parquet need to have it
    except ImportError as error:
        raise _without_pyarrow() from error
    try:
        if isinstance(path, RemoteTable):
            return pyarrow.parquet.ParquetFile(path.storage.open(path.url))
        return pyarrow.parquet.ParquetFile(path, memory_map=True)
    except (OSError, pyarrow.ArrowException) as error:
        raise _unreadable(path, error) from error


def parquet_rows(path: Path | RemoteTable) -> Iterator[Entry]:
    """The rows of a parquet file; the file's fault as one entry."""
    try:
        file = open_parquet(path)
    except InputError as error:
        if isinstance(error.__cause__, ImportError):
            raise
        yield Entry("the file", 0, fault=error)
        return
    with file:
        batches = file.iter_batches(batch_size=BATCH_ROWS)
        yield from _rows(batches, file.schema_arrow, path)


def arrow_rows(path: Path) -> Iterator[Entry]:
    """The rows of an Arrow file, a stream or with a footer; the file's fault as one entry."""
    try:
        import pyarrow
    except ImportError as error:
        raise _without_pyarrow() from error
    try:
        source = pyarrow.memory_map(str(path))
        try:
            reader: Any = pyarrow.ipc.open_stream(source)
            batches: Iterable[Any] = reader
        except pyarrow.ArrowInvalid:
            reader = pyarrow.ipc.open_file(source)
            batches = map(reader.get_batch, range(reader.num_record_batches))
    except (OSError, pyarrow.ArrowException) as error:
        yield Entry("the file", 0, fault=_unreadable(path, error))
        return
    with source:
        yield from _rows(batches, reader.schema, path)


def csv_rows(path: Path, suffix: str) -> Iterator[Entry]:
    """The rows of a CSV or TSV; the header tells a delimiter that is not the suffix's."""
    csv.field_size_limit(sys.maxsize)  # a cell may hold a picture
    number = 0
    with open_packed(path) as packed:
        # Bytes that are not UTF-8 are the fault of their row.
        text = io.TextIOWrapper(packed, "utf-8-sig", errors="surrogateescape", newline="")
        try:
            mark = _delimiter(path, suffix)
            reader = csv.DictReader(text, delimiter=mark, restkey="", strict=True)
            if twice := _twice(reader.fieldnames or []):
                raise _same_name(path, twice)
            while (entry := _csv_row(reader, number, path)) is not None:
                yield entry
                number += 1
        except UNPACKING_ERRORS as error:
            yield Entry(f"row {number} and all behind it", number, fault=incomplete(path, error))


def _without_pyarrow() -> InputError:
    return InputError(
        "parquet and Arrow are read with the package pyarrow, which is not installed; run: pip "
        "install pyarrow"
    )


def _unreadable(path: Path | RemoteTable, error: Exception) -> InputError:
    kind = "Arrow" if isinstance(path, Path) and path.suffix.lower() != ".parquet" else "parquet"
    return InputError(
        f"{path} cannot be read as {kind} ({str(error).splitlines()[0]}); fetch it again, or take "
        "it out of the folder"
    )


def _rows(batches: Iterable[Any], schema: Any, path: Path | RemoteTable) -> Iterator[Entry]:
    import pyarrow

    if twice := _twice(schema.names):
        yield Entry("the file", 0, fault=_same_name(path, twice))
        return
    names = _class_names(schema.metadata)
    number = 0
    try:
        for batch in batches:
            for row in range(batch.num_rows):
                yield _row(batch, row, number, names)
                number += 1
    except (OSError, pyarrow.ArrowException) as error:
        yield Entry(f"row {number} and all behind it", number, fault=_unreadable(path, error))


def _row(batch: Any, row: int, number: int, names: Mapping[str, list[str]]) -> Entry:
    where = f"row {number}"
    try:
        columns = zip(batch.schema.names, batch.columns, strict=True)
        record = {name: column[row].as_py() for name, column in columns}
    except UnicodeDecodeError as error:
        text = f"a text is not UTF-8: {error.reason} at byte {error.start}"
        return Entry(where, number, fault=InputError(text))
    for column, classes in names.items():
        if isinstance(record.get(column), int) and 0 <= record[column] < len(classes):
            record[column] = classes[record[column]]
    return Entry(where, number, record)


def _class_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """What the numbers in columns of classes stand for, as datasets writes it into the schema."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {
            name: feature["names"]
            for name, feature in features.items()
            if isinstance(feature, Mapping) and feature.get("_type") == "ClassLabel"
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def _twice(names: Sequence[str]) -> str | None:
    return next((name for name in names if names.count(name) > 1), None)


def _same_name(path: Path | RemoteTable, name: str) -> InputError:
    return InputError(f"{path} has two columns named {name!r}; rename or drop one")


def _delimiter(path: Path, suffix: str) -> str:
    header = start_of(path, line=True)
    usual = "\t" if suffix == ".tsv" else ","
    found = [mark for mark in (usual, "\t", ",", ";") if mark.encode() in header]
    return found[0] if found else usual


def _csv_row(reader: Any, number: int, path: Path) -> Entry | None:
    """The next row; None at the end. What is wrong with one row is not the next one's."""
    where = f"row {number}"
    try:
        row = next(reader, None)
        if row is None:
            return None
        "".join(map(str, row.values())).encode()
    except (csv.Error, UnicodeEncodeError) as error:
        what = error if isinstance(error, csv.Error) else "bytes that are none"
        text = f"{path}:{reader.reader.line_num}: not CSV in UTF-8: {what}"
        return Entry(where, number, fault=InputError(text))
    if row.pop("", None):
        text = f"{path}:{reader.reader.line_num}: more cells than the header has"
        return Entry(where, number, fault=InputError(text))
    return Entry(where, number, row)
