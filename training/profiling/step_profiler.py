"""A trace of chosen steps on chosen ranks, its table of phases, and the GPU's memory."""

import os
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from data_pipeline.errors import InputError
from data_pipeline.files import write_atomically
from training.config import ProfileSettings
from training.distributed import Ranks
from training.profiling.phase_table import phase_times, read_trace, table
from training.side_outputs import attempt, warn

_MEMORY_EVENTS = 200_000


class StepProfiler:
    """Traces the steps of `profile.steps` on the ranks of `profile.ranks`.

    `begins` and `done` are called around every step and `close` at the end; what was traced by then
    is written to `output_dir`/profile. Nothing of it can end the run.

    Raises:
        InputError: for a rank that there is not.
    """

    def __init__(self, settings: ProfileSettings, output_dir: Path, ranks: Ranks) -> None:
        if missing := [rank for rank in settings.ranks if rank >= ranks.world_size]:
            raise InputError(
                f"profile.ranks names {missing[0]}, but there are {ranks.world_size} ranks; give "
                f"ranks from 0 to {ranks.world_size - 1}"
            )
        self.settings, self.folder, self.ranks = settings, output_dir / "profile", ranks
        # None: nothing (more) is to be traced here.
        self._asked = settings.steps if ranks.rank in settings.ranks else None
        self._profile: profile | None = None
        self._first = self._done = 0

    def begins(self, step: int) -> None:
        """The 1-based step is about to begin."""
        if self._asked and self._profile and step > self._asked[1]:
            self.close()
        elif self._asked and not self._profile and self._asked[0] <= step <= self._asked[1]:
            attempt("no trace of this step", lambda: self._start(step))

    def done(self, step: int) -> None:
        """The step is done, but for a checkpoint or an evaluation behind it."""
        self._done = step

    def close(self) -> None:
        """Write what was traced; say so where none of the steps asked for has been run."""
        asked, self._asked = self._asked, None
        traced, self._profile = self._profile, None
        if traced and self._done >= self._first:
            attempt("no trace", lambda: self._write(traced))
        elif asked:
            warn(f"profile.steps={list(asked)}: none of them was run in this start")

    @property
    def _on_gpu(self) -> bool:
        return self.ranks.device.type == "cuda"

    def _start(self, step: int) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it says on stderr that it starts
        activities = [ProfilerActivity.CPU]
        if self._on_gpu:
            torch.cuda.synchronize(self.ranks.device)
            activities.append(ProfilerActivity.CUDA)
            if self.settings.memory:
                torch.cuda.memory._record_memory_history(max_entries=_MEMORY_EVENTS)
        traced = profile(activities=activities, record_shapes=self.settings.shapes)
        traced.start()
        self._profile, self._first = traced, step

    def _write(self, traced: profile) -> None:
        if self._on_gpu:
            torch.cuda.synchronize(self.ranks.device)
        traced.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        base = self.folder / f"steps-{self._first}-{self._done}-rank-{self.ranks.rank}"
        if self._on_gpu and self.settings.memory:
            torch.cuda.memory._dump_snapshot(f"{base}.memory.pickle")
            torch.cuda.memory._record_memory_history(enabled=None)
        trace = Path(f"{base}.trace.json.gz")
        traced.export_chrome_trace(str(trace))
        text = table(phase_times(read_trace(trace)), self._done - self._first + 1)
        write_atomically(Path(f"{base}.phases.txt"), f"{text}\n".encode())
        tqdm.write(f"\nper step, as in {trace}:\n{text}\n")
