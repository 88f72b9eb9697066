"""Index shards, several at a time, and publish the result in one go."""

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from data_pipeline.chat import ChatSettings
from data_pipeline.errors import InputError
from data_pipeline.index.files import (
    Patterns,
    expand_shards,
    folders_of,
    npz_path,
    partial_folder,
    partial_path,
    read_manifest,
    write_manifest,
)
from data_pipeline.index.shard import (
    ShardHeader,
    index_shard,
    load_shard_index,
    save_shard_index,
)
from data_pipeline.tokenizer import Tokenizer

_PRINTED_BAD_SAMPLES = 10  # per shard; the manifest lists all


def build_index(
    patterns: Patterns, tokenizer: Tokenizer, chat: ChatSettings, workers: int = 1
) -> None:
    """Index the shards that changed since they were indexed, and publish the index.

    `workers` processes share the shards; with 1 all happens in this process. Samples left out are
    printed. InputError naming every shard that is truncated, damaged or without a usable sample:
    the earlier index then stays as it was, and what is finished is kept for the next run.
    """
    shards = expand_shards(patterns)
    _make_folders(shards)
    todo = [shard for shard in shards if _find_done(shard, tokenizer, chat) is None]
    problems: list[str] = []
    total_bytes = sum(shard.stat().st_size for shard in todo)
    with tqdm(total=total_bytes, unit="B", unit_scale=True, desc="index", disable=None) as bar:
        for shard, outcome in _outcomes(todo, tokenizer, chat, workers):
            if isinstance(outcome, InputError):
                problems.append(str(outcome))
            else:
                _print_bad(outcome)
            bar.update(shard.stat().st_size)
    if problems:
        raise InputError("\n".join(sorted(problems)))
    _publish({shard: _find_done(shard, tokenizer, chat) for shard in shards})


def _make_folders(shards: Sequence[Path]) -> None:
    for folder in folders_of(shards):
        try:
            partial_folder(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"cannot write an index beside the shards in {folder} ({error.strerror}); make the "
                "folder writable, or copy or link the shards into one that is"
            ) from error


def _find_done(
    shard: Path, tokenizer: Tokenizer, chat: ChatSettings
) -> tuple[Path, ShardHeader] | None:
    """The file with this shard's index as it would be made now, finished or published."""
    for path in (partial_path(shard), npz_path(shard)):
        try:
            header = load_shard_index(path).header  # all of it: damage must not count as done
        except InputError:
            continue
        if header.describes(shard, tokenizer, chat):
            return path, header
    return None


def _index_to_partial(shard: Path, tokenizer: Tokenizer, chat: ChatSettings) -> ShardHeader:
    index = index_shard(shard, tokenizer, chat)
    save_shard_index(index, partial_path(shard))
    return index.header


def _outcomes(
    shards: Sequence[Path], tokenizer: Tokenizer, chat: ChatSettings, workers: int
) -> Iterator[tuple[Path, ShardHeader | InputError]]:
    """Every shard with its header, or with what is wrong with it, as they get done."""
    workers = min(workers, len(shards))
    if workers <= 1:
        for shard in shards:
            try:
                yield shard, _index_to_partial(shard, tokenizer, chat)
            except InputError as error:
                yield shard, error
        return
    # spawn: the parent may run threads (of a tokenizer, say) that do not survive a fork
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _set_worker, (tokenizer, chat)) as pool:
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


_worker: tuple[Tokenizer, ChatSettings] | None = None


def _set_worker(tokenizer: Tokenizer, chat: ChatSettings) -> None:
    global _worker
    _worker = tokenizer, chat


def _worker_task(shard: Path) -> ShardHeader:
    assert _worker is not None, "the pool's initializer sets it"
    return _index_to_partial(shard, *_worker)


def _print_bad(header: ShardHeader) -> None:
    for bad in header.bad[:_PRINTED_BAD_SAMPLES]:
        tqdm.write(f"left out {header.shard}:{bad['key']}: {bad['reason']}")
    more = len(header.bad) - _PRINTED_BAD_SAMPLES
    if more > 0:
        tqdm.write(f"left out {more} more samples of {header.shard}; the manifest lists them")


def _publish(finished: dict[Path, tuple[Path, ShardHeader] | None]) -> None:
    """Move finished shards into place and list them; other shards of a folder stay listed.

    Killed between the moves and the manifest, the two disagree by digest: `load_index` says so,
    and the next run only has to write the manifest.
    """
    if changed := [str(shard) for shard, done in finished.items() if done is None]:
        raise InputError(f"{', '.join(changed)} changed while indexed; run again once complete")
    for folder in folders_of(list(finished)):
        try:
            headers = read_manifest(folder)
        except InputError:  # none yet, or of an earlier schema
            headers = {}
        headers = {name: header for name, header in headers.items() if (folder / name).exists()}
        for shard, done in finished.items():
            if shard.parent == folder and done is not None:
                path, headers[shard.name] = done
                path.replace(npz_path(shard))
        write_manifest(folder, headers)
        for left_over in partial_folder(folder).iterdir():
            left_over.unlink()
        partial_folder(folder).rmdir()
