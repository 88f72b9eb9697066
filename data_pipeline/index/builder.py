"""Index shards, several at a time, and publish the result in one go."""

import multiprocessing
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from pathlib import Path

from tqdm import tqdm

from data_pipeline.chat import ChatSettings
from data_pipeline.errors import InputError
from data_pipeline.files import file_lock
from data_pipeline.index.columns import load_columns, load_header, save_columns
from data_pipeline.index.header import ShardHeader
from data_pipeline.index.index_files import IndexFiles, find_index_files
from data_pipeline.index.index_shard import broken_shard, index_shard
from data_pipeline.index.tar import ShardFault
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
    decode: bool = False,
    strict: bool = False,
) -> None:
    """Index the shards that changed since they were indexed, and publish the index.

    Where nothing changed, nothing is written. A second run on the same index waits for the first,
    and finds its work. Samples left out are printed; so are shards that are truncated, damaged or
    without a usable sample, which are left out whole.

    InputError, and the earlier index stays as it was, if a shard cannot be read from where it is
    stored, if none has a usable sample, or, where `strict`, if one is left out.

    Args:
        workers: processes that share the shards; with 1 all happens in this process.
        index_dir: local folder for the index; None: beside the shards, which must then be local.
        storage: how the shards are read.
        decode: decode every picture, so that none is found damaged in training.
        strict: a shard that cannot be used ends the run, named with all others.
        share: (k, n) indexes only shards k, k+n, k+2n, ... and publishes nothing: a run without
            it does, once all n are done.
    """
    part, parts = share
    if not 0 <= part < parts:
        raise InputError(f"the share is {part}/{parts}; expected 0/{parts} .. {parts - 1}/{parts}")
    storage = storage or Storage()
    shards = storage.expand(patterns)
    files = find_index_files(shards, index_dir)
    job = _Job(tokenizer, chat, storage, files, decode)
    if parts == 1 and _is_published(shards, job, strict):
        return
    _make_folders(files)
    with ExitStack() as locks:
        for place in files.values():
            locks.enter_context(file_lock(place.lock, shared=parts > 1))
        _index(shards[part::parts], job, workers)
        if parts == 1:
            _publish(shards, job, strict)


def _index(shards: Sequence[Shard], job: "_Job", workers: int) -> None:
    """Index those of the shards that changed; their columns then wait to be published."""
    stats = dict(zip(shards, job.storage.stat_all(shards), strict=True))
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


class _Job:
    """What indexing a shard takes; goes to the worker processes."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat: ChatSettings,
        storage: Storage,
        files: dict[str, IndexFiles],
        decode: bool,
    ) -> None:
        self.tokenizer, self.chat, self.storage, self.files = tokenizer, chat, storage, files
        self.decode = decode

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
            if header.describes(shard, stat, self.tokenizer, self.chat, self.decode):
                return path, header
        return None

    def run(self, shard: Shard) -> ShardHeader:
        """Index a shard; its columns then wait to be published."""
        made = self.tokenizer, self.chat, self.storage
        try:
            header, columns = index_shard(shard, *made, self.decode)
        except ShardFault as fault:
            header, columns = broken_shard(shard, *made, fault)
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
    if header.broken:
        tqdm.write(f"left out the shard {header.broken}")
        return
    for bad in header.bad[:_PRINTED_BAD_SAMPLES]:
        tqdm.write(f"left out {header.shard}:{bad['key']}: {bad['reason']}")
    more = len(header.bad) - _PRINTED_BAD_SAMPLES
    if more > 0:
        tqdm.write(f"left out {more} more samples of {header.shard}; the manifest lists them")


def _print_summary(headers: Sequence[ShardHeader]) -> None:
    whole = [header for header in headers if not header.broken]
    if len(whole) < len(headers):
        print(f"left out {len(headers) - len(whole):,} of {len(headers):,} shards (above)")
    faults = Counter(bad["fault"] for header in whole for bad in header.bad)
    if faults:
        counts = ", ".join(f"{fault}: {count:,}" for fault, count in faults.most_common())
        samples = sum(header.samples for header in whole) + faults.total()
        print(f"left out {faults.total():,} of {samples:,} samples ({counts})")
    passed = sum((Counter(header.passed_over) for header in whole), Counter[str]())
    if passed:
        kinds = ", ".join(f"{kind or 'hidden'} {count:,}" for kind, count in passed.most_common())
        print(f"members passed over, of no sample: {kinds}")
    if unused := sum(header.unused_images for header in headers):
        print(f"images that no message names (not used): {unused:,}")


def _publish(shards: Sequence[Shard], job: _Job, strict: bool) -> None:
    """Move finished shards into place and list them; other shards of a folder stay listed.

    Killed between the moves and the manifest, the two disagree by digest: `Index.columns` says so,
    and the next run only has to write the manifest.
    """
    finished = _finished(shards, job, whole=False)
    if changed := [str(shard) for shard in shards if shard not in finished]:
        raise InputError(f"{', '.join(changed)} changed while indexed; run again once complete")
    broken = [str(header.broken) for _, header in finished.values() if header.broken]
    if broken and (strict or len(broken) == len(shards)):
        raise InputError("\n".join(sorted(broken)))
    for files in job.files.values():
        for shard, (path, _) in finished.items():
            if shard.folder == files.shards:
                path.replace(files.columns(shard))
        files.write_manifest(_headers(files, _manifest(files), finished))
        shutil.rmtree(files.partial_folder, ignore_errors=True)


def _is_published(shards: Sequence[Shard], job: _Job, strict: bool) -> bool:
    """Whether `_publish` would change nothing."""
    for files in job.files.values():
        if files.partial_folder.exists() or not files.manifest.exists():
            return False
    finished = _finished(shards, job, whole=True)
    for shard in shards:
        if shard not in finished or finished[shard][0] != job.files[shard.folder].columns(shard):
            return False
        if strict and finished[shard][1].broken:
            return False
    listed = {files: _manifest(files) for files in job.files.values()}
    return all(_headers(files, headers, finished) == headers for files, headers in listed.items())


def _finished(
    shards: Sequence[Shard], job: _Job, whole: bool
) -> dict[Shard, tuple[Path, ShardHeader]]:
    """Those of the shards that are indexed as they are now, as in `_Job.find_done`."""
    stats = zip(shards, job.storage.stat_all(shards), strict=True)
    done = ((shard, job.find_done(shard, stat, whole)) for shard, stat in stats)
    return {shard: found for shard, found in done if found is not None}


def _headers(
    files: IndexFiles,
    headers: dict[str, ShardHeader],
    finished: dict[Shard, tuple[Path, ShardHeader]],
) -> dict[str, ShardHeader]:
    """What the manifest lists once these shards join its `headers`; no shard that is gone."""
    if "://" not in files.shards:
        headers = {n: h for n, h in headers.items() if (Path(files.shards) / n).exists()}
    own = {s.name: header for s, (_, header) in finished.items() if s.folder == files.shards}
    return headers | own


def _manifest(files: IndexFiles) -> dict[str, ShardHeader]:
    """What the manifest lists; nothing if there is none yet, or one of an earlier schema."""
    try:
        return files.read_manifest()
    except InputError:
        return {}
