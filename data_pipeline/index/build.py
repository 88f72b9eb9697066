"""Index shards, several at a time, and publish the result in one go."""

import multiprocessing
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from data_pipeline.chat import ChatSettings
from data_pipeline.errors import InputError
from data_pipeline.index.columns import load_columns, load_header, save_columns
from data_pipeline.index.files import IndexFiles, find_index_files
from data_pipeline.index.header import ShardHeader
from data_pipeline.index.shard import index_shard
from data_pipeline.storage import Patterns, Shard, ShardStat, Storage
from data_pipeline.tokenizer import Tokenizer

_PRINTED_BAD_SAMPLES = 10  # per shard; the manifest lists all


def build_index(
    patterns: Patterns,
    tokenizer: Tokenizer,
    chat: ChatSettings,
    workers: int = 1,
    index_dir: Path | str | None = None,
    storage: Storage | None = None,
    share: tuple[int, int] = (0, 1),
) -> None:
    """Index the shards that changed since they were indexed, and publish the index.

    Samples left out are printed. InputError naming every shard that is truncated, damaged or
    without a usable sample: the earlier index then stays as it was, and what is finished is kept
    for the next run.

    Args:
        workers: processes that share the shards; with 1 all happens in this process.
        index_dir: local folder for the index; None: beside the shards, which must then be local.
        storage: how the shards are read.
        share: (k, n) indexes only shards k, k+n, k+2n, ... and publishes nothing: a run without
            it does, once all n are done.
    """
    part, parts = share
    if not 0 <= part < parts:
        raise InputError(f"the share is {part}/{parts}; expected 0/{parts} .. {parts - 1}/{parts}")
    storage = storage or Storage()
    shards = storage.expand(patterns)
    files = find_index_files(shards, index_dir)
    _make_folders(files)
    job = _Job(tokenizer, chat, storage, files)
    own = shards[part::parts]
    stats = dict(zip(own, storage.stat_all(own), strict=True))
    todo = {shard: stat for shard, stat in stats.items() if job.find_done(shard, stat) is None}
    problems: list[str] = []
    headers: list[ShardHeader] = []
    total_bytes = sum(stat.bytes for stat in todo.values())
    with tqdm(total=total_bytes, unit="B", unit_scale=True, desc="index", disable=None) as bar:
        for shard, outcome in _outcomes(list(todo), job, workers):
            if isinstance(outcome, InputError):
                problems.append(str(outcome))
            else:
                headers.append(outcome)
                _print_bad(outcome)
            bar.update(todo[shard].bytes)
    _print_summary(headers)
    if problems:
        raise InputError("\n".join(sorted(problems)))
    if parts == 1:
        _publish(shards, job)


class _Job:
    """What indexing a shard takes; goes to the worker processes."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat: ChatSettings,
        storage: Storage,
        files: dict[str, IndexFiles],
    ) -> None:
        self.tokenizer, self.chat, self.storage, self.files = tokenizer, chat, storage, files

    def find_done(
        self, shard: Shard, stat: ShardStat, whole: bool = True
    ) -> tuple[Path, ShardHeader] | None:
        """The file with this shard's index as it would be made now, finished or published.

        `whole`: all of it is read, so that a damaged one does not count.
        """
        files = self.files[shard.folder]
        for path in (files.partial(shard), files.columns(shard)):
            try:
                header = ShardHeader(**(load_columns(path)[0] if whole else load_header(path)))
            except (InputError, TypeError):  # TypeError: of an earlier schema
                continue
            if header.describes(shard, stat, self.tokenizer, self.chat):
                return path, header
        return None

    def run(self, shard: Shard) -> ShardHeader:
        """Index a shard; its columns then wait to be published."""
        header, columns = index_shard(shard, self.tokenizer, self.chat, self.storage)
        save_columns(self.files[shard.folder].partial(shard), header.to_dict(), columns)
        return header


def _make_folders(files: dict[str, IndexFiles]) -> None:
    for place in files.values():
        try:
            place.partial_folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"cannot write an index of the shards in {place.shards} to {place.folder} "
                f"({error.strerror}); make the folder writable, or name another with --index-dir"
            ) from error


def _outcomes(
    shards: Sequence[Shard], job: _Job, workers: int
) -> Iterator[tuple[Shard, ShardHeader | InputError]]:
    """Every shard with its header, or with what is wrong with it, as they get done."""
    workers = min(workers, len(shards))
    if workers <= 1:
        for shard in shards:
            try:
                yield shard, job.run(shard)
            except InputError as error:
                yield shard, error
        return
    # spawn: the parent may run threads (of a tokenizer, say) that do not survive a fork
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _set_worker, (job,)) as pool:
        futures = {pool.submit(_worker_task, shard): shard for shard in shards}
        try:
            for future in as_completed(futures):
                problem = future.exception()
                if isinstance(problem, InputError):
                    yield futures[future], problem
                else:
                    yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


_worker: _Job | None = None


def _set_worker(job: _Job) -> None:
    global _worker
    _worker = job


def _worker_task(shard: Shard) -> ShardHeader:
    assert _worker is not None, "the pool's initializer sets it"
    return _worker.run(shard)


def _print_bad(header: ShardHeader) -> None:
    for bad in header.bad[:_PRINTED_BAD_SAMPLES]:
        tqdm.write(f"left out {header.shard}:{bad['key']}: {bad['reason']}")
    more = len(header.bad) - _PRINTED_BAD_SAMPLES
    if more > 0:
        tqdm.write(f"left out {more} more samples of {header.shard}; the manifest lists them")


def _print_summary(headers: Sequence[ShardHeader]) -> None:
    faults = Counter(bad["fault"] for header in headers for bad in header.bad)
    if faults:
        counts = ", ".join(f"{fault}: {count:,}" for fault, count in faults.most_common())
        samples = sum(header.samples for header in headers) + faults.total()
        print(f"left out {faults.total():,} of {samples:,} samples ({counts})")
    if unused := sum(header.unused_images for header in headers):
        print(f"images that no message names (not used): {unused:,}")


def _publish(shards: Sequence[Shard], job: _Job) -> None:
    """Move finished shards into place and list them; other shards of a folder stay listed.

    Killed between the moves and the manifest, the two disagree by digest: `Index.columns` says so,
    and the next run only has to write the manifest.
    """
    stats = job.storage.stat_all(shards)
    finished = {
        shard: job.find_done(shard, stat, whole=False)
        for shard, stat in zip(shards, stats, strict=True)
    }
    if changed := [str(shard) for shard, done in finished.items() if done is None]:
        raise InputError(f"{', '.join(changed)} changed while indexed; run again once complete")
    for folder, files in job.files.items():
        try:
            headers = files.read_manifest()
        except InputError:  # none yet, or of an earlier schema
            headers = {}
        if "://" not in folder:
            headers = {n: header for n, header in headers.items() if (Path(folder) / n).exists()}
        for shard, done in finished.items():
            if shard.folder == folder and done is not None:
                path, headers[shard.name] = done
                path.replace(files.columns(shard))
        files.write_manifest(headers)
        for left_over in files.partial_folder.iterdir():
            left_over.unlink()
        files.partial_folder.rmdir()
