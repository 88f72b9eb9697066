"""Evaluation over the ranks: what is left to do, done, gathered and checked."""

import hashlib
import json
import os
import platform
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import fsum, isqrt
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data_pipeline.errors import InputError
from data_pipeline.files import write_atomically
from training.distributed import Ranks, from_main, gather
from training.evaluate.examples import Example, HeldOut
from training.evaluate.latency import measure_latency
from training.evaluate.router import ROUTER_FILE
from training.evaluate.row_store import RowStore, check_complete
from training.evaluate.scoring import Scorer
from training.generate import LoadedModel

Row = dict[str, Any]
_MODEL_FILES = ("*.safetensors", "*.bin", "*.json", "*.model", "*.jinja")


@dataclass(frozen=True)
class EvaluationSettings:
    """out: the folder. latency_samples: answers timed per count. Others as in `Scorer`."""

    out: Path
    max_new_tokens: int
    batch_tokens: int
    generate_all: bool = False
    latency_samples: int = 16


def evaluate_counts(
    loaded: LoadedModel,
    held_out: HeldOut,
    counts: Sequence[int],
    settings: EvaluationSettings,
    ranks: Ranks,
) -> tuple[dict[int, dict[int, Row]], dict[int, dict[str, Any]]]:
    """Score every sample at every count; all ranks must call this.

    Returns:
        On rank 0: count -> sample -> row, and count -> latencies. Elsewhere empty dicts.

    Raises:
        InputError: the folder holds another evaluation, or a sample has no row or two.
    """
    store = RowStore(settings.out, ranks.rank)
    description = _describe(loaded, held_out, settings) if ranks.is_main else {}
    from_main(lambda: store.claim(description))
    store.mend()
    gather(None)  # nobody reads what another is mending
    found, before = from_main(lambda: _found(store, counts))
    new = _score_missing(loaded, held_out, counts, settings, ranks, store, found)
    parts = [before, *gather(_sums(new))]
    rows: dict[int, dict[int, Row]] = {}
    # Raised on every rank, so that none waits for a rank 0 that has ended.
    from_main(lambda: rows.update(_gathered(store, counts, held_out, parts)))
    return rows, _latencies(loaded, held_out, counts, settings) if ranks.is_main else {}


def _found(store: RowStore, counts: Sequence[int]) -> tuple[dict[int, set[int]], tuple[int, float]]:
    """The samples that have a row at each count, and the sums of these rows."""
    rows = {count: own for count, own in store.read().items() if count in counts}
    sums = _sums(row for own in rows.values() for row in own.values())
    return {count: set(own) for count, own in rows.items()}, sums


def _gathered(
    store: RowStore, counts: Sequence[int], held_out: HeldOut, parts: list[tuple[int, float]]
) -> dict[int, dict[int, Row]]:
    """All rows, once they are complete and sum to what the ranks say they have written."""
    rows = store.read()
    samples = held_out.samples.tolist()
    check_complete(rows, counts, samples)
    chosen = {count: {sample: rows[count][sample] for sample in samples} for count in counts}
    written, scores = sum(p[0] for p in parts), fsum(p[1] for p in parts)
    number, total = _sums(row for count in counts for row in rows[count].values())
    if number != written or abs(total - scores) > 1e-6 * max(1.0, total):
        raise InputError(
            f"the ranks wrote {written} rows with scores of {scores:.6f} in all, but {number} rows "
            f"with {total:.6f} are in {store.folder}: every node must see the same --out"
        )
    return chosen


def _sums(rows: Any) -> tuple[int, float]:
    """(number, sum of scores) of rows."""
    scores = [row.get("score", 0.0) for row in rows]
    return len(scores), fsum(scores)


def _score_missing(
    loaded: LoadedModel,
    held_out: HeldOut,
    counts: Sequence[int],
    settings: EvaluationSettings,
    ranks: Ranks,
    store: RowStore,
    found: dict[int, set[int]],
) -> list[Row]:
    """Score this rank's batches where rows are missing, and write them; returns the new rows."""
    batches = held_out.batches(isqrt(max(counts)), settings.batch_tokens)[
        ranks.rank :: ranks.world_size
    ]
    todo = [
        (batch, {count: [s for s in batch if s not in found.get(count, ())] for count in counts})
        for batch in batches
    ]
    todo = [(batch, missing) for batch, missing in todo if any(missing.values())]
    scorer = Scorer(loaded, held_out, settings.max_new_tokens, settings.generate_all)
    total = sum(bool(samples) for _, missing in todo for samples in missing.values())
    bar = tqdm(total=total, unit="batch", disable=None if ranks.is_main else True)
    new: list[Row] = []
    done = sum(len(found.get(count, ())) for count in counts)
    for (batch, missing), examples in zip(todo, _read_ahead(held_out, todo), strict=True):
        for count in counts:
            if not missing[count]:
                continue
            wanted = set(missing[count])
            # The whole batch, so that a row does not depend on where a run was killed.
            rows = scorer.score(examples, isqrt(count))
            rows = [row for row in rows if row["sample"] in wanted]
            store.append(count, rows)
            new += rows
            bar.update()
        _note_progress(ranks, done + len(new))
        assert len(examples) == len(batch)
    bar.close()
    return new


def _read_ahead(
    held_out: HeldOut, todo: Sequence[tuple[list[int], Any]]
) -> Iterator[list[Example]]:
    """The examples of each batch, read while the one before is scored."""
    with ThreadPoolExecutor(1, thread_name_prefix="evaluation-reader") as pool:
        pending: deque[Future[list[Example]]] = deque()
        for batch, _ in [*todo, ([], None)]:
            pending.append(pool.submit(lambda own: [held_out.read(s) for s in own], batch))
            if len(pending) > 1:
                yield pending.popleft().result()


def _note_progress(ranks: Ranks, rows: int) -> None:
    """For slurm/lib.sh, which gives up a job that restarts without getting on."""
    path = os.environ.get("PROGRESS_FILE")
    if ranks.is_main and path:
        write_atomically(Path(path), str(rows).encode())


def _latencies(
    loaded: LoadedModel, held_out: HeldOut, counts: Sequence[int], settings: EvaluationSettings
) -> dict[int, dict[str, Any]]:
    """Latencies by count, from the folder where this machine measured them before."""
    samples = min(settings.latency_samples, len(held_out.samples))
    if not samples:
        return {}
    path = settings.out / "latency.json"
    machine = {
        "device": loaded.device_name,
        "host": platform.node(),
        "threads": torch.get_num_threads(),
        "samples": samples,
    }
    saved: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    if saved.get("machine") != machine:
        saved = {"machine": machine, "counts": {}}
    for count in counts:
        if str(count) not in saved["counts"]:
            saved["counts"][str(count)] = measure_latency(
                loaded, held_out, isqrt(count), samples, settings.max_new_tokens
            )
            write_atomically(path, json.dumps(saved, indent=1).encode())
    return {count: saved["counts"][str(count)] for count in counts}


def _describe(
    loaded: LoadedModel, held_out: HeldOut, settings: EvaluationSettings
) -> dict[str, Any]:
    """What rows depend on; batches and ranks do not change what is right."""
    return {
        "model": model_fingerprint(loaded),
        "data": held_out.index.fingerprint,
        "samples": len(held_out.samples),
        "chat": held_out.chat.model_dump(mode="json"),
        "tiling": held_out.tiling.model_dump(mode="json"),
        "reduced_jpeg": held_out.reduced_jpeg,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "generate": settings.generate_all,
        "max_new_tokens": settings.max_new_tokens,
    }


def model_fingerprint(loaded: LoadedModel) -> str:
    """Hex digest of a folder's files but its router, or the commit of a model from the hub."""
    folder = Path(loaded.source)
    if not folder.is_dir():
        return f"{loaded.source}@{getattr(loaded.config, '_commit_hash', None)}"
    digest = hashlib.sha256()
    files = {p for pattern in _MODEL_FILES for p in folder.glob(pattern)}
    for path in sorted(files - {folder / ROUTER_FILE}):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").digest()
        digest.update(path.name.encode() + b"\0" + content)
    return digest.hexdigest()
