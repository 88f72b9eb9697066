"""Saving during a run: lock, snapshot, publication in the background, what to do when it fails."""

import shutil
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed

from data_pipeline.errors import InputError
from training.checkpoint import folder_layout as layout
from training.checkpoint.folder_layout import Manifest, finished
from training.checkpoint.lock import FolderLock
from training.checkpoint.progress import Progress, rng_state
from training.checkpoint.pruning import write_scores
from training.checkpoint.publication import Plan, Publication, first_error
from training.config import CheckpointSettings
from training.distributed import Ranks, all_reduce_sum, from_main
from training.engine_interface import Engine
from training.side_outputs import SideFiles, warn

EXIT_WAIT_S = 60.0
"""Longest wait for this rank's own shards when the run ends with an error."""
OTHERS_WAIT_S = 5.0
"""Longest wait for those of the others then: they may be gone."""


class Saver:
    """Saves a run's checkpoints into one folder, which it locks: `with Saver(...) as saver`.

    Every rank calls every method, in the same order.
    """

    def __init__(self, folder: Path, settings: CheckpointSettings, ranks: Ranks) -> None:
        self.folder, self.settings, self.ranks = folder, settings, ranks
        self.stall_s = 0.0
        """How long the last `save` held training up."""
        self.total_stall_s = 0.0
        self.last_error: str | None = None
        """Why the last save failed; None if it did not."""
        self.failures = 0
        """Saves that failed, in a row."""
        self.about_run: dict[str, Any] = {}
        """What `Manifest.run` is to hold."""
        self._lock = FolderLock(folder)
        self._pending: Publication | None = None
        self._published: int | None = None
        self._bytes = 0
        self._frozen: dict[str, str] | None = None

    def __enter__(self) -> "Saver":
        from_main(self._open)
        return self

    def _open(self) -> None:
        layout.refuse_inside(self.folder.parent)
        self._lock.acquire()
        for leftover in layout.leftovers(self.folder):
            shutil.rmtree(leftover, ignore_errors=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self.wait()
            elif self._pending is not None:
                # No collectives: this may be the only rank that fails.
                self._pending.written.wait(EXIT_WAIT_S)
                self._pending.join(OTHERS_WAIT_S)
        finally:
            self._lock.release()

    def check_space(self, engine: Engine) -> None:
        """Before the first step: is there room for all the checkpoints this run will keep?

        Raises:
            InputError: saying what is needed and what is free, or that the engine's settings do
                not let it be saved.
        """
        total = all_reduce_sum([float(engine.snapshot_bytes())], self.ranks.device)[0]
        self._bytes = int(total)
        from_main(self._check_space)
        self._frozen = engine.frozen_hashes()

    def _check_space(self) -> None:
        kept = self.settings.keep + (self.settings.keep_best is not None)
        count = kept + 1
        there = len(finished(self.folder)[-kept:])
        free = shutil.disk_usage(self.folder).free
        if free < (count - there) * self._bytes:
            raise InputError(
                f"{self.folder} has {gigabytes(free)} free; {count} checkpoints (checkpoint.keep + "
                f"{count - self.settings.keep}) of {gigabytes(self._bytes)} are needed, {there} of "
                "them are there; make room, lower checkpoint.keep, or use another output_dir"
            )

    def save(
        self, engine: Engine, progress: Progress, fingerprints: dict[str, Any], wait: bool = False
    ) -> None:
        """Save model, optimizer, RNG and plan position of all ranks as of now.

        Returns once a copy is in host memory; writing and publishing go on in the background
        unless `checkpoint.background` is false. With `wait`, tries twice and returns only when
        the checkpoint is published. A save that fails is a warning at the next call.

        Raises:
            InputError: on every rank, if two saves in a row failed.
        """
        started = time.perf_counter()
        try:
            self._finish()
            if self._published == progress.step:
                return
            for _ in range(2 if wait else 1):
                self._start(engine, progress, fingerprints)
                if wait or not self.settings.background:
                    self._finish()
                if self.last_error is None:
                    break
        finally:
            self.stall_s = time.perf_counter() - started
            self.total_stall_s += self.stall_s

    def compare(self, evaluations: dict[int, dict[str, Any]], files: SideFiles) -> None:
        """Say on rank 0 how good the steps were, for `checkpoint.keep_best`."""
        if self.ranks.is_main:
            write_scores(self.folder, self.settings.keep_best, evaluations, files)

    def wait(self) -> Path | None:
        """Wait until everything saved is published; returns the newest checkpoint.

        Raises:
            InputError: on every rank, if two saves in a row failed.
        """
        self._finish()
        return from_main(lambda: next(reversed(finished(self.folder)), None))

    def _start(self, engine: Engine, progress: Progress, fingerprints: dict[str, Any]) -> None:
        """Take the snapshot and begin to publish it, if there is room."""
        temporary = self.folder / (layout.TEMPORARY + layout.step_name(progress.step))
        self.last_error = from_main(lambda: self._too_little_space(temporary))
        if self.last_error is not None:
            self._count(self.last_error)
            return
        if self._frozen is None:
            self._frozen = engine.frozen_hashes()
        frozen, world_size = self._frozen, self.ranks.world_size
        shards = engine.snapshot(rng_state())
        plan = Plan(
            self.folder,
            progress.step,
            self.settings.keep,
            self.settings.keep_every_steps,
            lambda files: Manifest(
                *(progress.step, progress.plan.to_dict(), world_size, fingerprints),
                *(files, frozen, self.about_run),
            ),
        )
        self._pending = Publication(plan, shards, self.ranks.rank, world_size)

    def _too_little_space(self, temporary: Path) -> str | None:
        shutil.rmtree(temporary, ignore_errors=True)  # of a failed save of this step
        try:
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            return str(error)
        if free >= self._bytes:
            return None
        return f"{gigabytes(free)} free in {self.folder}, {gigabytes(self._bytes)} needed"

    def _finish(self) -> None:
        """Wait for the publication under way and agree on how it went."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        pending.written.wait()
        reports: list[Any] = [None] * self.ranks.world_size
        torch.distributed.all_gather_object(reports, pending.report)
        pending.tell(reports)
        pending.join()
        error = from_main(lambda: pending.error) or first_error(reports)
        if error is None:
            self._published = pending.plan.step
            self._bytes = sum(e["bytes"] for r in reports for e in r["files"].values())
        self._count(error, pending.plan.step)

    def _count(self, error: str | None, step: int | None = None) -> None:
        """Warn of a failed save; stop at the second in a row."""
        self.last_error = error
        self.failures = 0 if error is None else self.failures + 1
        if error is None:
            return
        what = "the checkpoint" if step is None else f"the checkpoint of step {step}"
        if self.failures > 1:
            raise InputError(
                f"{what} could not be saved, the second in a row: {error}; the last whole one "
                f"is the newest step-* in {self.folder}. Make room there and start again"
            )
        if self.ranks.is_main:
            warn(f"{what} could not be saved: {error}; training goes on, a second time ends it")


def gigabytes(count: float) -> str:
    """A number of bytes as people read it."""
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"
