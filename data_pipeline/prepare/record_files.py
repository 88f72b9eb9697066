"""Files of records: JSON, JSON lines, parquet, Arrow, CSV; a bad line or file ends no other."""

import json
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.errors import InputError
from data_pipeline.prepare.entries import PACKED, Entry, RemoteTable, record_suffix
from data_pipeline.prepare.json_records import json_entries
from data_pipeline.prepare.table_records import arrow_rows, csv_rows, open_parquet, parquet_rows
from data_pipeline.storage import Storage

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
CSV_SUFFIXES = (".csv", ".tsv")
ARROW_SUFFIXES = (".arrow", ".feather")
OF_DATASETS = ("state.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")
"""What Hugging Face datasets writes beside its tables: no records."""
SUFFIXES = (*JSON_SUFFIXES, ".parquet", *ARROW_SUFFIXES, *CSV_SUFFIXES)


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

    JSON and CSV may be packed with gzip, bzip2, xz or zstd.

    Raises:
        InputError: the file is missing, of another kind, or JSON that does not parse as a whole.
    """
    if isinstance(path, RemoteTable):
        return parquet_rows(path)
    if not path.is_file():
        raise InputError(f"{path} is not a file; expected one of {', '.join(SUFFIXES)}")
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return parquet_rows(path)
    if suffix in ARROW_SUFFIXES:
        return arrow_rows(path)
    suffix = record_suffix(path)
    if suffix in CSV_SUFFIXES:
        return csv_rows(path, suffix)
    if suffix in JSON_SUFFIXES:
        return json_entries(path, suffix)
    advice = "; unpack it first" if suffix in (".zip", ".tar", ".tgz") else ""
    raise InputError(
        f"{path} is no file of records: expected one of {', '.join(SUFFIXES)} (JSON and CSV also "
        f"as {', '.join(PACKED)}){advice}"
    )


def arrow_files(folder: Path) -> list[Path]:
    """The Arrow files of a folder that are its data, as `save_to_disk` lists them in state.json.

    InputError if the list is damaged, or names rows that were selected and not written.
    """
    found = [p for p in sorted(folder.iterdir()) if p.suffix.lower() in ARROW_SUFFIXES]
    if not (folder / "state.json").is_file():
        return [path for path in found if not path.name.startswith("cache-")]
    try:
        state = json.loads((folder / "state.json").read_bytes())
        names = [entry["filename"] for entry in state["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / 'state.json'} is not that of a saved dataset") from error
    if state.get("_indices_files"):
        raise InputError(
            f"{folder} holds a selection of rows that was not written out; load it with datasets "
            "and save dataset.flatten_indices()"
        )
    return [folder / name for name in names]


def count_entries(path: Path | RemoteTable) -> int | None:
    """Number of records, where the file tells it at once; None if not, or if it is damaged."""
    if isinstance(path, Path) and path.suffix.lower() != ".parquet":
        return None
    try:
        with open_parquet(path) as file:
            return int(file.metadata.num_rows)
    except InputError:
        return None
