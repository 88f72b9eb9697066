"""What a run's folder tells of it; the run may still be going."""

import json
import os
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from data_pipeline.errors import InputError
from data_pipeline.yaml_text import read_yaml
from training.checkpoint import best, finished, read_manifest
from training.goodput import Summary, summarize
from training.metrics import read_evaluations, read_metrics
from training.metrics.metrics_log import METRICS
from training.report.sample_answers import SampleAnswers

Row = dict[str, Any]
COUNTED = ("bad_samples", "too_long", "store_retries")
"""Metrics of a step that are troubles, added up over the run."""


@dataclass
class SavedStep:
    """A finished checkpoint."""

    step: int
    saved: datetime
    ranks: int
    size: int
    note: str


@dataclass
class RunFacts:
    """A run as its output_dir holds it.

    name: what tells it from the others on the page. rows, evaluations: of `metrics.jsonl` and
    `evaluations.jsonl`. settings: `config.yaml` as text; `config` as read. starts: the notes of
    every start. profiles: (name, table) of traced steps. goodput: None where it was not recorded.
    samples: answers to held-out samples, where they were asked for.
    """

    folder: Path
    rows: list[Row]
    evaluations: list[Row]
    settings: str
    config: Row
    name: str = ""
    starts: list[Row] = field(default_factory=list)
    profiles: list[tuple[str, str]] = field(default_factory=list)
    checkpoints: list[SavedStep] = field(default_factory=list)
    goodput: Summary | None = None
    samples: list[SampleAnswers] = field(default_factory=list)

    @property
    def step(self) -> int:
        """The last step on record."""
        return int(self.rows[-1]["step"])

    @property
    def steps(self) -> int:
        """Where the run ends by its settings; 0 if they do not say."""
        return int((self.config.get("train") or {}).get("steps") or 0)

    @property
    def state(self) -> str:
        """How it ended, or that it goes on, as far as the record tells."""
        reason = self.goodput.processes[-1].reason if self.goodput else "not known"
        return "going, or killed" if reason == "not ended" else reason

    def total(self, key: str) -> float:
        """The sum of a metric over all steps."""
        return sum(row[key] for row in self.rows if isinstance(row.get(key), int | float))

    def rate(self, key: str) -> float:
        """A metric per second of all steps."""
        return self.total(key) / (self.total("step_s") or 1.0)

    def mean(self, key: str) -> float | None:
        """The mean of a metric over the time of the steps that have it; None without any."""
        rows = [row for row in self.rows if isinstance(row.get(key), int | float)]
        seconds = sum(row["step_s"] for row in rows)
        return sum(row[key] * row["step_s"] for row in rows) / seconds if seconds else None

    def keys(self, prefix: str) -> list[str]:
        """Metrics whose names begin so, in the order of their first steps."""
        return list(
            dict.fromkeys(key for row in self.rows for key in row if key.startswith(prefix))
        )


def read_facts(folder: Path) -> RunFacts:
    """Everything a run's folder holds.

    Raises:
        InputError: there is no run, or no step is on record.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give the output_dir of a run")
    rows = read_metrics(folder / METRICS)
    if not rows:
        raise InputError(
            f"{folder / METRICS} holds no step; give the output_dir of a run that training.train "
            "made, once its first step is done"
        )
    file = folder / "config.yaml"
    settings = file.read_text(encoding="utf-8") if file.is_file() else ""
    facts = RunFacts(
        folder, rows, read_evaluations(folder), settings, read_yaml(settings, str(file)) or {}
    )
    facts.starts = [
        found for path in _sorted(folder / "starts", "*.json") if (found := _json(path))
    ]
    tables = _sorted(folder / "profile", "*.phases.txt")
    facts.profiles = [(path.name.removesuffix(".phases.txt"), path.read_text()) for path in tables]
    facts.checkpoints = _checkpoints(folder / "checkpoints")
    try:
        facts.goodput = summarize(folder)
    except InputError:
        facts.goodput = None
    return facts


def name_apart(runs: list[RunFacts]) -> None:
    """Give runs the shortest ends of their paths that differ."""
    paths = [run.folder.resolve() for run in runs]
    shared = os.path.commonpath([path.parent for path in paths])
    for run, path in zip(runs, paths, strict=True):
        run.name = str(path.relative_to(shared)) if len(set(paths)) > 1 else path.name


def _sorted(folder: Path, pattern: str) -> list[Path]:
    return sorted(folder.glob(pattern)) if folder.is_dir() else []


def _json(path: Path) -> Row:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _checkpoints(folder: Path) -> list[SavedStep]:
    """The finished checkpoints, oldest first; one that is pruned meanwhile is left out."""
    top, found = best(folder) if folder.is_dir() else None, []
    for path in finished(folder) if folder.is_dir() else []:
        try:
            manifest = read_manifest(path)
            saved = datetime.fromtimestamp(path.stat().st_mtime)
        except (InputError, OSError):
            continue
        note = f"best ({top})" if top and top.path == path else ""
        found.append(
            SavedStep(manifest.step, saved, manifest.world_size, manifest.total_bytes, note)
        )
    return sorted(found, key=lambda item: item.step)
