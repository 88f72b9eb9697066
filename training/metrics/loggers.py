"""TensorBoard's scalars for Weights & Biases, MLflow and trackio, over all starts of a run.

`output_dir`/loggers.json notes by logger which run there is this one, and the position
(`LoggedRow`) up to which it has been given rows. A resumed run goes on there: rows that come again
are not logged again, and rows on record in `output_dir` that are not there, as after an outage, are
logged first. A start at step 0 is a new run there.
"""

import importlib.util
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from data_pipeline.errors import InputError
from training.config import RunConfig
from training.metrics.logger_packages import PACKAGES, LoggedRun, Logger
from training.metrics.logger_thread import LoggedRow, LoggerThread
from training.side_outputs import SideFiles, warn

NOTE = "loggers.json"
CLOSE_S = 10.0
"""Longest wait at the end for all loggers: what they lack then, the next start logs."""
_NOTE_BYTES = 2048


def check_loggers(config: RunConfig) -> None:
    """Are the packages of `metrics.loggers` installed?

    Raises:
        InputError: saying what to install.
    """
    missing = [name for name in config.metrics.loggers if not _installed(name)]
    if missing:
        raise InputError(
            f"metrics.loggers names {', '.join(missing)}, not installed here: "
            f"pip install {' '.join(missing)}, or take it out"
        )


def _installed(name: str) -> bool:
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None  # a mere folder, as W&B leaves, has none


class Loggers:
    """All loggers of a run, a thread each; no call raises, none but `close` waits.

    Args:
        first_step: the step that the run goes on from.
        past: the rows on record up to there; called in the threads.
        make: logger by name.
    """

    def __init__(
        self,
        config: RunConfig,
        first_step: int,
        files: SideFiles,
        past: Callable[[], Iterable[LoggedRow]],
        make: Callable[[str], Logger] = lambda name: PACKAGES[name](),
    ) -> None:
        self.config, self.first_step, self.past = config, first_step, past
        self.note = _Note(config.output_dir / NOTE, files)
        names = config.metrics.loggers
        self.threads = [LoggerThread(name, _Resumed(self, name, make(name))) for name in names]

    def add(self, row: LoggedRow) -> None:
        """Have every logger log a row."""
        for thread in self.threads:
            thread.add(row)

    def close(self) -> None:
        """Wait for what can be logged, and say what is lacking."""
        for thread in self.threads:
            thread.stop()
        end = time.monotonic() + CLOSE_S
        for thread in self.threads:
            thread.join(end - time.monotonic())


class _Resumed:
    """A logger with the note of what it has been given: the sink of its thread."""

    def __init__(self, loggers: Loggers, name: str, logger: Logger) -> None:
        self.loggers, self.name, self.logger = loggers, name, logger

    def begin(self) -> tuple[int, Iterator[LoggedRow]]:
        config, first = self.loggers.config, self.loggers.first_step
        project = config.metrics.project
        noted = self.loggers.note.of(self.name)
        goes_on = first > 0 and noted.get("project") == project and "run" in noted
        run = LoggedRun(
            project,
            config.metrics.name or config.output_dir.resolve().name,
            config.output_dir,
            config.model_dump(mode="json"),
            noted["run"] if goes_on else None,
            noted.get("position", 0) if goes_on else 0,
        )
        found, position = self.logger.start(run)
        self.loggers.note.put(self.name, {"project": project, "run": found, "position": position})
        if (there := position // 2) > first:
            warn(f"{self.name} has the steps up to {there}: {first + 1} to it are not logged again")
        missing = (row for row in self.loggers.past() if row.position > position)
        return position, iter(list(missing))

    def log(self, row: LoggedRow) -> None:
        self.logger.log(row)
        noted = self.loggers.note.of(self.name)
        self.loggers.note.put(self.name, noted | {"position": row.position})

    def finish(self) -> None:
        self.logger.finish()


class _Note:
    """`loggers.json`: by logger what must be known at the next start."""

    def __init__(self, path: Path, files: SideFiles) -> None:
        self._path, self._files, self._lock = path, files, threading.Lock()
        self._found: dict[str, dict[str, Any]] = {}
        self._written = False
        try:
            found = json.loads(path.read_bytes())
            self._found = {k: v for k, v in found.items() if isinstance(v, dict)}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, AttributeError) as error:
            warn(f"{path}: {error}; loggers begin a new run, with all steps on record")

    def of(self, name: str) -> dict[str, Any]:
        return self._found.get(name, {})

    def put(self, name: str, noted: dict[str, Any]) -> None:
        with self._lock:
            self._found[name] = noted
            # Of one length, so that each can be written over the last; the first one is atomic.
            content = json.dumps(self._found).encode().ljust(_NOTE_BYTES - 1) + b"\n"
            over = self._written and len(content) == _NOTE_BYTES and self._path.exists()
            self._written = True
            self._files.replace(self._path, content, in_place=over)
