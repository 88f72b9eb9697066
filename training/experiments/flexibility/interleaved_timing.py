"""Time of a step in each arm: short runs in turn, so that other load meets all of them alike."""

import json
import shutil
import statistics
from pathlib import Path
from typing import Any

from data_pipeline.errors import InputError
from data_pipeline.files import write_atomically
from training import exit_codes
from training.experiments.flexibility.experiment_runs import ExperimentRuns, launch, log_end
from training.experiments.flexibility.experiment_settings import ArmRun
from training.experiments.flexibility.seed_statistics import SeedInterval
from training.metrics import read_metrics

_WARMUP = 5


def time_arms(runs: ExperimentRuns, measure: bool = True) -> list[dict[str, float]]:
    """Rounds of arm -> median seconds of a step; those that are there are not measured again.

    measure: else only what is there.
    """
    experiment = runs.experiment
    settings = experiment.timing
    path = experiment.out / "timing.json"
    rounds: list[dict[str, float]] = json.loads(path.read_text()) if path.is_file() else []
    while measure and settings and len(rounds) < settings.rounds and not runs.stop():
        found = {}
        for arm in experiment.arms:
            found[arm] = _median_step_s(runs, arm, settings.steps)
            if runs.stop():
                return rounds
        rounds.append(found)
        write_atomically(path, json.dumps(rounds, indent=1).encode())
    return rounds


def _median_step_s(runs: ExperimentRuns, arm: str, steps: int) -> float:
    folder: Path = runs.experiment.out / "timing-run"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    overrides = runs.overrides(ArmRun(arm, runs.experiment.seeds[0], "samples"))
    more = [f"train.steps={steps}", f"output_dir={folder}", "data.eval_shards=[]"]
    log = folder / "train.log"
    experiment = runs.experiment
    code = launch(experiment.base, [*overrides, *more], experiment.ranks, log, runs.stop)
    if code != exit_codes.OK and not runs.stop():
        raise InputError(f"timing {arm} ended with exit code {code}: {log_end(log)}")
    rows = read_metrics(folder / "metrics.jsonl")[_WARMUP:]
    shutil.rmtree(folder, ignore_errors=True)
    return statistics.median(row["step_s"] for row in rows) if rows else 0.0


def time_ratios(rounds: list[dict[str, float]], reference: str) -> dict[str, dict[str, Any]]:
    """Arm -> the time of a step over that of the reference, in the mean of the rounds."""
    if not rounds or reference not in rounds[0]:
        return {}
    return {
        arm: SeedInterval.of([found[arm] / found[reference] for found in rounds]).to_json()
        for arm in rounds[0]
    }
