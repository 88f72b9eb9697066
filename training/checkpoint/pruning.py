"""Which checkpoints stay: the newest, every m-th step's, and the best one of an evaluation.

`DIR/scores.json` holds the setting `checkpoint.keep_best` and each evaluated step's value; the best
is found among the checkpoints that are there, so that one whose save failed protects no other from
staying.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.checkpoint.folder_layout import BAD, finished, step_of
from training.side_outputs import SideFiles, warn

SCORES = "scores.json"
_SIGN = {"accuracy": 1.0, "loss": -1.0}


@dataclass(frozen=True)
class Best:
    """The checkpoint whose evaluation was best, the earliest of equals."""

    path: Path
    metric: str
    value: float

    def __str__(self) -> str:
        return f"{self.metric} {self.value:.4g}"


def write_scores(
    folder: Path, metric: str | None, evaluations: dict[int, dict[str, Any]], files: SideFiles
) -> None:
    """Note what `best` goes by; without a metric, that it goes by nothing."""
    if metric is None and not (folder / SCORES).exists():
        return
    found = {str(step): row.get(metric) for step, row in evaluations.items() if metric}
    scores = {
        step: value
        for step, value in found.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }
    text = json.dumps({"metric": metric, "scores": scores}, indent=1)
    files.replace(folder / SCORES, text.encode())


def best(folder: Path) -> Best | None:
    """The best checkpoint of a folder; None where none was evaluated, or nobody asked for it."""
    try:
        noted = json.loads((folder / SCORES).read_bytes())
        metric, scores = noted["metric"], noted["scores"]
        values = {int(step): float(value) for step, value in scores.items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        warn(f"{folder / SCORES} cannot be read ({error}): no checkpoint counts as the best")
        return None
    there = [path for path in finished(folder) if step_of(path) in values]
    if metric not in _SIGN or not there:
        return None
    path = max(there, key=lambda path: _SIGN[metric] * values[step_of(path)])  # first of equals
    return Best(path, metric, values[step_of(path)])


def to_prune(folder: Path, keep: int, keep_every_steps: int) -> list[Path]:
    """The finished checkpoints beyond the newest `keep`, without every m-th step's and the best.

    And of the damaged ones that resumes have set aside all but the newest: each is a whole one's
    size.
    """
    damaged = sorted(folder.glob(BAD + "*"))[:-1]
    kept = best(folder)
    return damaged + [
        path
        for path in finished(folder)[:-keep]
        if (not keep_every_steps or step_of(path) % keep_every_steps)
        and not (kept and path == kept.path)
    ]
