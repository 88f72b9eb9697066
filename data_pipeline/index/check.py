"""Checking shards against their index: every member is read, nothing is written."""

import multiprocessing
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from data_pipeline.errors import InputError
from data_pipeline.index.columns import ShardColumns
from data_pipeline.index.header import ShardHeader
from data_pipeline.index.index_files import IndexFiles, find_index_files
from data_pipeline.index.open_index import load_shard_columns, read_headers
from data_pipeline.index.tar import SampleMembers, group_samples, scan_tar
from data_pipeline.storage import Patterns, ReadAhead, Shard, Storage


@dataclass(frozen=True)
class Difference:
    """What a shard has otherwise than its index says; `key` is empty for the whole shard."""

    shard: str
    key: str
    what: str

    def __str__(self) -> str:
        return f"{self.shard}:{self.key}: {self.what}" if self.key else f"{self.shard}: {self.what}"


@dataclass(frozen=True)
class CheckReport:
    """What was checked, and every difference found."""

    shards: int
    samples: int
    bytes: int
    differences: list[Difference]


def check_index(
    patterns: Patterns,
    index_dir: Path | str | None = None,
    storage: Storage | None = None,
    workers: int = 1,
) -> CheckReport:
    """Read every member of the shards and compare sizes and CRCs with the index.

    Differences are printed as they are found. InputError if the shards are not indexed at all.

    Args:
        workers: processes that share the shards.
        index_dir, storage: as for `build_index`.
    """
    storage = storage or Storage()
    shards = storage.expand(patterns)
    files = find_index_files(shards, index_dir)
    manifests = {folder: place.read_manifest() for folder, place in files.items()}
    listed = [shard for shard in shards if shard.name in manifests[shard.folder]]
    headers = read_headers(listed, files)
    found = [
        Difference(str(shard), "", f"is not in the index {files[shard.folder].manifest}")
        for shard in shards
        if shard not in set(listed)
    ]
    for folder, manifest in manifests.items():
        names = {shard.name for shard in shards if shard.folder == folder}
        found += _gone(folder, sorted(set(manifest) - names))
    for difference in found:
        tqdm.write(str(difference))
    tasks = [
        _Task(shard, header, files[shard.folder], storage)
        for shard, header in zip(listed, headers, strict=True)
    ]
    total = sum(header.bytes for header in headers)
    with tqdm(total=total, unit="B", unit_scale=True, desc="check", disable=None) as bar:
        for task, differences in _outcomes(tasks, workers):
            for difference in differences:
                tqdm.write(str(difference))
            found += differences
            bar.update(task.header.bytes)
    return CheckReport(len(shards), sum(header.samples for header in headers), total, found)


@dataclass(frozen=True)
class _Task:
    """What checking one shard takes."""

    shard: Shard
    header: ShardHeader
    files: IndexFiles
    storage: Storage

    def run(self) -> list[Difference]:
        """Every difference between the shard and its index."""
        found: list[tuple[str, str]] = []
        try:
            columns = load_shard_columns(self.shard, self.header, self.files)
            size = self.storage.stat(self.shard).bytes
            if size != self.header.bytes:
                found.append(("", f"has {size} bytes; its index was made for {self.header.bytes}"))
            found += self._compare(columns, ReadAhead(self.storage, self.shard, size))
        except InputError as error:
            found.append(("", str(error)))
        return [Difference(str(self.shard), key, what) for key, what in found]

    def _compare(self, columns: ShardColumns, reader: ReadAhead) -> Iterator[tuple[str, str]]:
        """(key, difference) of the samples, and ("", problem) if the tar cannot be read through."""
        rows = {key: row for row, key in enumerate(columns.keys.tolist())}
        bad = {entry["key"] for entry in self.header.bad}
        by_key: dict[str, list[str]] = {}
        problem = None
        try:
            for key, group in group_samples(scan_tar(reader)):
                if key in rows:
                    by_key[key] = list(_differences(columns, rows[key], group, reader))
                elif key not in bad:
                    by_key[key] = ["is in the shard, but not in its index"]
        except InputError as error:
            problem = str(error)
        for key, differences in by_key.items():
            yield from ((key, what) for what in differences)
        for key in rows:
            if key not in by_key:
                yield key, "is in the index, but not in the shard"
        if problem:
            yield "", problem


def _differences(
    columns: ShardColumns, row: int, group: SampleMembers, reader: ReadAhead
) -> Iterator[str]:
    if group.problem:
        yield group.problem
    members = {member.offset: (name, member.size) for name, member in group.members.items()}
    c = columns
    images = range(c.image_start[row], c.image_start[row + 1])
    expected = [(c.text_offset[row], c.text_size[row], c.text_crc[row])]
    expected += [(c.image_offset[j], c.image_bytes[j], c.image_crc[j]) for j in images]
    for number, (offset, size, crc) in enumerate(expected):
        name, found = members.get(int(offset), ("", -1))
        what = "the text" if not number else f"image {number - 1}"
        if not name:
            yield f"{what} is no longer at byte {offset}"
        elif found != size:
            yield f"{what} ({name!r}) has {found} bytes, {size} when it was indexed"
        elif zlib.crc32(reader.read(int(offset), int(size))) != crc:
            yield f"{what} ({name!r}) has other bytes than when it was indexed"


def _outcomes(tasks: list[_Task], workers: int) -> Iterator[tuple[_Task, list[Difference]]]:
    workers = min(workers, len(tasks))
    if workers <= 1:
        yield from ((task, task.run()) for task in tasks)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context) as pool:
        futures = {pool.submit(task.run): task for task in tasks}
        try:
            yield from ((futures[future], future.result()) for future in as_completed(futures))
        finally:
            pool.shutdown(cancel_futures=True)


def _gone(folder: str, names: list[str]) -> list[Difference]:
    """Listed shards that the patterns did not mean and that are not there any more (local only)."""
    if "://" in folder:
        return []
    missing = [name for name in names if not (Path(folder) / name).exists()]
    return [
        Difference(str(Path(folder) / name), "", "is in the index, but not there any more")
        for name in missing
    ]
