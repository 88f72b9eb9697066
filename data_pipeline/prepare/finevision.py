"""The format of FineVision on the Hugging Face hub: parquet files with the images inside.

Columns: `images`, a list of {bytes, path}; `texts`, a list of {user, assistant}; `source`; ratings
of each turn from 1 to 5 with their minimum, such as `relevance_min`. Other columns are not read.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from data_pipeline.chat import check_messages
from data_pipeline.errors import InputError
from data_pipeline.images import open_image
from data_pipeline.prepare.convert import Candidate, Sample, Unwanted, convert
from data_pipeline.prepare.shard_writer import ShardLimits

# Rows with their images are held at once so many at a time.
BATCH_ROWS = 32
RELEVANCE = "relevance_min"
_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "JPEG2000": "jp2"}

_Row = Mapping[str, Any]
"""Arrow scalars by column; only what is wanted is turned into Python objects."""


def prepare_finevision(
    source: Path,
    out: Path,
    *,
    min_relevance: int | None = None,
    limits: ShardLimits | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Convert parquet files into shards in `out`; returns the report.

    All images of a row come first in its first user turn; texts are kept as they are. Faulty rows
    are skipped and reported with file and row (from 0). The files are read a few rows at a time.

    Args:
        source: a parquet file, or a folder of them, subfolders included.
        min_relevance: leave out rows whose `relevance_min` is below; rows without a rating stay.

    Raises:
        InputError: pyarrow is missing, no parquet file is there, one cannot be read or has other
            columns, nothing is usable, or `out` may not be written.
    """
    files = _parquet_files(source)
    wanted = ["images", "texts", *([] if min_relevance is None else [RELEVANCE])]
    rows = sum(_check_file(path, wanted) for path in files)
    folder = source if source.is_dir() else source.parent
    return convert(
        _candidates(files, folder, min_relevance),
        out,
        total=rows,
        sources=(source,),
        limits=limits or ShardLimits(),
        overwrite=overwrite,
        settings={
            "format": "finevision",
            "source": str(source),
            "files": len(files),
            "min_relevance": min_relevance,
        },
    )


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet  # only those who convert parquet need to have it
    except ImportError as error:
        raise InputError(
            "--format finevision reads parquet with the package pyarrow, which is not installed; "
            "run: pip install pyarrow"
        ) from error
    return pyarrow


def _parquet_files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise InputError(f"{source} does not exist; expected a .parquet file or a folder of them.")
    files = sorted(path for path in source.rglob("*.parquet") if path.is_file())
    if not files:
        raise InputError(f"no file in {source} is named *.parquet; name their folder.")
    return files


def _open(path: Path) -> Any:
    """The ParquetFile; close it."""
    pyarrow = _pyarrow()
    try:
        return pyarrow.parquet.ParquetFile(path, memory_map=True)
    except (OSError, pyarrow.ArrowException) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(
        f"{path} cannot be read as parquet ({str(error).splitlines()[0]}); fetch it again, or take "
        "it out of the folder."
    )


def _check_file(path: Path, wanted: Sequence[str]) -> int:
    """Number of rows of a file; InputError if it lacks a column or one is of another type."""
    with _open(path) as file:
        columns = {field.name: field.type for field in file.schema_arrow}
        usable = {
            "images": lambda kind: _is_list_of(kind, ("bytes",), "binary"),
            "texts": lambda kind: _is_list_of(kind, ("user", "assistant"), "string"),
            RELEVANCE: lambda kind: str(kind).startswith(("int", "uint", "float", "double")),
        }
        if all(name in columns and usable[name](columns[name]) for name in wanted):
            return int(file.metadata.num_rows)
        expected = ["images: list<{bytes, path}>", "texts: list<{user, assistant}>"]
        expected += [f"{RELEVANCE}: a number"] if RELEVANCE in wanted else []
        found = ", ".join(f"{name}: {kind}" for name, kind in columns.items())
        raise InputError(
            f"{path} has not the columns of FineVision: found {found or 'none'}; expected "
            f"{', '.join(expected)}"
        )


def _is_list_of(kind: Any, names: Sequence[str], leaf: str) -> bool:
    """Whether an Arrow type is a list of structs with these fields, `leaf` naming their type."""
    struct = getattr(kind, "value_type", None)
    fields = {field.name: str(field.type) for field in getattr(struct, "fields", ())}
    return all(fields.get(name) in (leaf, f"large_{leaf}") for name in names)


def _candidates(
    files: Sequence[Path], folder: Path, min_relevance: int | None
) -> Iterator[Candidate]:
    for path in files:
        name = path.relative_to(folder).with_suffix("").as_posix()
        for number, row in enumerate(_rows(path, min_relevance is not None)):
            # The end of a long path tells more, and the row number must not be cut off.
            key = f"{name[-54:]}_{number:08d}"
            build = partial(_build, row, key, min_relevance)
            yield Candidate(f"{path.relative_to(folder)}, row {number}", build)


def _rows(path: Path, rated: bool) -> Iterator[_Row]:
    pyarrow = _pyarrow()
    with _open(path) as file:
        wanted = ("images", "texts", "source", *((RELEVANCE,) if rated else ()))
        columns = [name for name in wanted if name in file.schema_arrow.names]
        try:
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=columns):
                for number in range(batch.num_rows):
                    yield {name: batch.column(name)[number] for name in columns}
        except (OSError, pyarrow.ArrowException) as error:
            raise _unreadable(path, error) from error


def _build(row: _Row, key: str, min_relevance: int | None) -> Sample:
    rating = row[RELEVANCE].as_py() if RELEVANCE in row else None
    if min_relevance is not None and rating is not None and rating < min_relevance:
        raise Unwanted(f"--min-relevance {min_relevance}")
    try:
        content = {name: column.as_py() for name, column in row.items()}
    except UnicodeDecodeError as error:
        raise InputError(f"a text is not UTF-8: {error.reason} at byte {error.start}") from error
    images = _images(content["images"] or [])
    messages = _messages(content["texts"] or [], list(images))
    check_messages(messages)
    source = content.get("source")
    return Sample(key, messages, images, {"source": source} if isinstance(source, str) else {})


def _images(entries: Sequence[Mapping[str, Any] | None]) -> dict[str, bytes]:
    """The file of each image, by its name: "0.jpg", "1.png", ..."""
    images = {}
    for number, entry in enumerate(entries):
        data = entry and entry["bytes"]
        if not data:
            path = entry and entry.get("path")
            told = f"only the path {path!r:.80}" if path else "nothing"
            raise InputError(f"image {number} has {told} where the bytes of a file are expected")
        try:
            with open_image(data) as image:
                kind = image.format or "image"
        except InputError as error:
            raise InputError(f"image {number}: {error}") from error
        images[f"{number}.{_EXTENSIONS.get(kind, kind.lower())}"] = data
    return images


def _messages(
    texts: Sequence[Mapping[str, Any] | None], images: Sequence[str]
) -> list[dict[str, Any]]:
    if not texts:
        raise InputError('"texts" is empty: there is no turn to learn from')
    messages: list[dict[str, Any]] = []
    for number, turn in enumerate(texts):
        where = f"turn {number} of {len(texts)}"
        user, assistant = (turn["user"], turn["assistant"]) if turn else (None, None)
        parts = [{"type": "image", "image": name} for name in images] if number == 0 else []
        if user:
            parts.append({"type": "text", "text": user})
        if not parts:
            raise InputError(f"{where} has no user text")
        if not assistant or not assistant.strip():
            raise InputError(f"{where} has no assistant text")
        answer = [{"type": "text", "text": assistant}]
        messages += [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    return messages
