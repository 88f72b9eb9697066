"""What each package of `metrics.loggers` needs; they are imported in their threads."""

import json
import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from training.metrics.logger_thread import LoggedRow
from training.metrics.wandb_offline import last_logged


@dataclass(frozen=True)
class LoggedRun:
    """What a logger shows a run as."""

    project: str
    name: str
    folder: Path
    """Where a package may leave files."""
    config: dict[str, Any]
    id: str | None
    """That of the run there which goes on; None: a new one."""
    noted: int
    """The position of the last row that it was given; what a kill left unsent is not there."""


class Logger(Protocol):
    """One package; all calls come from one thread, and any of them may raise or hang."""

    def start(self, run: LoggedRun) -> tuple[str, int]:
        """The run's id there, and the position of the last row that is there; 0: none."""

    def log(self, row: LoggedRow) -> None:
        """Take one row; they come in order."""

    def finish(self) -> None:
        """Send what is left, and end the run."""


class WandbLogger:
    """Weights & Biases; offline (WANDB_MODE=offline) a folder for each start, which are one run."""

    def start(self, run: LoggedRun) -> tuple[str, int]:
        import wandb

        there = last_logged(run.folder, run.id) if run.id else 0  # of offline starts
        # Without the time limit, a missing key is asked for on a terminal.
        settings = wandb.Settings(console="off", login_timeout=1)
        self.run = wandb.init(
            project=run.project,
            name=run.name,
            id=run.id or secrets.token_hex(4),
            dir=run.folder,
            config=run.config,
            resume="allow",
            settings=settings,
        )
        self.run.define_metric("*", step_metric="step")
        if self.run.offline:
            return self.run.id, there
        return self.run.id, self.run.step - 1 if self.run.resumed else 0

    def log(self, row: LoggedRow) -> None:
        # W&B's own counter takes each number once: a step and its evaluation have one each.
        self.run.log(row.values | {"step": row.step}, step=row.position)

    def finish(self) -> None:
        self.run.finish()


class MlflowLogger:
    """MLflow, at MLFLOW_TRACKING_URI."""

    def __init__(self) -> None:
        self.id = ""

    def start(self, run: LoggedRun) -> tuple[str, int]:
        from mlflow import MlflowClient

        self.client = MlflowClient()
        if run.id is not None:
            self.id = run.id
            self.client.update_run(self.id, status="RUNNING")
            step = int(self.client.get_run(self.id).data.metrics.get("step", 0))
            return self.id, _position(step, run.noted)
        if not self.id:  # else the attempt before this one came so far
            found = self.client.get_experiment_by_name(run.project)
            folder = found.experiment_id if found else self.client.create_experiment(run.project)
            self.id = self.client.create_run(folder, run_name=run.name).info.run_id
        self._log_config(run.config)
        return self.id, 0

    def _log_config(self, config: dict[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(key, value) for key, value in _flat(config).items()]
        for begin in range(0, len(params), 100):  # the most that a request takes
            self.client.log_batch(self.id, params=params[begin : begin + 100], synchronous=True)

    def log(self, row: LoggedRow) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        values = {re.sub(r"[^\w\-. :/]", "_", tag): value for tag, value in row.values.items()}
        values["step"] = row.step  # in one request with the others: the last one there is asked for
        metrics = [Metric(key, value, now, row.step) for key, value in values.items()]
        self.client.log_batch(self.id, metrics=metrics, synchronous=True)

    def finish(self) -> None:
        self.client.set_terminated(self.id)


class TrackioLogger:
    """trackio, in TRACKIO_DIR, or in the Space or at the server that its variables name."""

    def start(self, run: LoggedRun) -> tuple[str, int]:
        import trackio

        # It knows runs by their names.
        name = run.id or f"{run.name}-{secrets.token_hex(4)}"
        self.run = trackio.init(run.project, name, config=run.config, resume="allow", embed=False)
        last = self.run._next_step - 1  # it has no other way to ask that serves remote runs
        return name, _position(max(last, 0), run.noted)

    def log(self, row: LoggedRow) -> None:
        self.run.log(row.values, step=row.step)

    def finish(self) -> None:
        self.run.finish()


PACKAGES: dict[str, type[Logger]] = {
    "wandb": WandbLogger,
    "mlflow": MlflowLogger,
    "trackio": TrackioLogger,
}


def _position(step: int, noted: int) -> int:
    """The position of the last row, which is of a step or of the evaluation after it."""
    return min(max(noted, 2 * step), 2 * step + 1)


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as "train.steps": "200"."""
    found: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value if isinstance(value, str) else json.dumps(value)
    return found
