"""One save on its way to disk, in a thread: shards, marker, and on rank 0 all that follows.

Threads use no collectives, which would mix with training's: ranks tell rank 0 by a marker file
`rank-00003.json` in the temporary folder, and in `Saver.wait` through the main threads.
"""

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import torch

from data_pipeline.files import write_atomically
from training.checkpoint.folder_layout import (
    LATEST,
    TEMPORARY,
    Manifest,
    publish,
    remove,
    step_name,
)
from training.checkpoint.pruning import to_prune
from training.side_outputs import attempt

Report = dict[str, Any]
"""A rank's outcome: {"files": {name: {"bytes", "sha256"}}, "error": cause or None}."""
POLL_S = 0.02


@dataclass(frozen=True)
class Plan:
    """What is to be published, the same on every rank."""

    folder: Path
    step: int
    keep: int
    keep_every_steps: int
    manifest: Callable[[dict[str, Any]], Manifest]
    """The manifest, given the files of all ranks."""

    @property
    def temporary(self) -> Path:
        return self.folder / (TEMPORARY + step_name(self.step))

    @property
    def final(self) -> Path:
        return self.folder / step_name(self.step)


class Publication:
    """Writes this rank's shards; on rank 0 then publishes once every rank has written its own."""

    def __init__(self, plan: Plan, shards: dict[str, Any], rank: int, world_size: int) -> None:
        self.plan, self.rank, self.world_size = plan, rank, world_size
        self.report: Report = {"files": {}, "error": "not written"}
        self.written = threading.Event()
        self.error: str | None = None
        """Why rank 0 could not publish."""
        self._shards = shards
        self._told: list[Report] | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def tell(self, reports: list[Report]) -> None:
        """Give rank 0 the outcomes of all ranks, should a marker never show up."""
        self._told = reports

    def join(self, timeout_s: float | None = None) -> None:
        """Wait until this rank's part is done; give up after `timeout_s`."""
        self._thread.join(timeout_s)
        self._stop.set()

    def _run(self) -> None:
        self.report = write_shards(self.plan.temporary, self._shards, self.rank)
        self._shards = {}
        self.written.set()
        if self.rank > 0:
            return
        try:
            if reports := self._collect():
                self._publish(reports)
        except Exception as error:
            self.error = f"rank 0: {describe(error)}"

    def _collect(self) -> list[Report] | None:
        """The reports of all ranks; None if this process ends before they are there."""
        markers = [marker(self.plan.temporary, rank) for rank in range(self.world_size)]
        while not self._stop.wait(POLL_S):
            if self._told is not None:
                return self._told
            if all(path.exists() for path in markers):
                return [json.loads(path.read_bytes()) for path in markers]
        return None

    def _publish(self, reports: list[Report]) -> None:
        plan = self.plan
        try:
            self.error = first_error(reports)
            if self.error is None:
                files = {
                    name: entry for report in reports for name, entry in report["files"].items()
                }
                for rank in range(self.world_size):
                    marker(plan.temporary, rank).unlink(missing_ok=True)
                publish(plan.temporary, plan.final, plan.manifest(files))
        finally:
            shutil.rmtree(plan.temporary, ignore_errors=True)  # if it was not renamed
        if self.error is None:
            self._after()

    def _after(self) -> None:
        """What follows a checkpoint that is safe: no failure here makes it a failed one."""
        plan, but = self.plan, f"{self.plan.final} is saved, but"
        attempt(but, lambda: write_atomically(plan.folder / LATEST, plan.final.name.encode()))
        if path := os.environ.get("PROGRESS_FILE"):
            attempt(but, lambda: write_atomically(Path(path), f"{plan.step}\n".encode()))
        for old in to_prune(plan.folder, plan.keep, plan.keep_every_steps):
            attempt(but, partial(remove, old))


def marker(temporary: Path, rank: int) -> Path:
    """The file by which a rank says that its shards are written, or why not."""
    return temporary / f"rank-{rank:05d}.json"


def first_error(reports: list[Report]) -> str | None:
    """The cause of the first rank that failed, with its number."""
    errors = [(rank, report["error"]) for rank, report in enumerate(reports) if report["error"]]
    return f"rank {errors[0][0]}: {errors[0][1]}" if errors else None


def describe(error: BaseException) -> str:
    """An error with its type or file, in one line."""
    return str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"


def write_shards(temporary: Path, shards: dict[str, Any], rank: int) -> Report:
    """Write one rank's shards and its marker; never raises."""
    report: Report = {"files": {}, "error": None}
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        for name, state in shards.items():
            report["files"][name] = write_shard(temporary / name, state)
    except Exception as error:
        report["error"] = describe(error)
        for name in shards:  # makes room for the marker on a full disk
            (temporary / name).unlink(missing_ok=True)
    try:
        write_atomically(marker(temporary, rank), json.dumps(report).encode())
    except OSError as error:
        report["error"] = report["error"] or describe(error)
    return report


def write_shard(path: Path, state: Any) -> dict[str, Any]:
    """Write one .pt file to disk; returns `{"bytes": n, "sha256": hex}` of what was written."""
    with path.open("wb", buffering=2**20) as file:
        hashing = _HashingFile(file)
        try:
            torch.save(state, cast(IO[bytes], hashing))
        except RuntimeError as error:  # torch hides what the file raised
            raise hashing.error or error from error
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": hashing.bytes, "sha256": hashing.digest.hexdigest()}


class _HashingFile:
    """A file to write to that hashes what passes through."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.bytes = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(data)
        self.bytes += len(data)
        return len(data)

    def flush(self) -> None:
        self.file.flush()
