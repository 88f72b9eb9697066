"""The record of an experiment: runs, tables, savings and claims, from the runs that are done."""

from collections.abc import Mapping
from typing import Any

from data_pipeline.machine import measured_on
from training.experiments.flexibility.experiment_runs import SUMS, ExperimentRuns
from training.experiments.flexibility.experiment_settings import (
    ArmRun,
    Basis,
    ExperimentSettings,
)
from training.experiments.flexibility.interleaved_timing import time_ratios
from training.experiments.flexibility.paper_claims import (
    Claim,
    accuracy_claims,
    saving_claims,
)
from training.experiments.flexibility.seed_statistics import Scores
from training.record.run_record import PACKAGES

BASES: tuple[Basis, ...] = ("samples", "compute")
Results = Mapping[ArmRun, Mapping[str, Any]]


def finished(runs: ExperimentRuns) -> dict[ArmRun, dict[str, Any]]:
    """What the runs that are done measured."""
    found = {run: runs.result(run) for run in runs.experiment.runs}
    return {run: result for run, result in found.items() if result is not None}


def scores_of(experiment: ExperimentSettings, results: Results, basis: Basis) -> Scores:
    """The scores at equal samples, or at equal compute; there the budget's arm is what it was."""
    chosen = {
        (run.arm, run.seed): result["evaluation"]
        for run, result in results.items()
        if run.basis == basis or run.arm == experiment.budget
    }
    return Scores(chosen, {name: [*arm.draw] for name, arm in experiment.arms.items()})


def make_record(
    experiment: ExperimentSettings,
    results: Results,
    rounds: list[dict[str, float]],
    gflop: Mapping[int, float],
    command: str,
) -> dict[str, Any]:
    """Everything that docs and pictures are made of.

    rounds: of `time_arms`. gflop: count -> of an answer's forward pass, in the mean.
    """
    bases = [basis for basis in BASES if any(run.basis == basis for run in results)]
    spent, reference = spent_of(experiment, results), largest_fixed(experiment)
    ratios = time_ratios(rounds, reference) if reference else {}
    for arm, ratio in ratios.items():
        spent.setdefault(arm, {})["time"] = ratio["mean"]
    claims: dict[str, list[Claim]] = {
        basis: accuracy_claims(scores_of(experiment, results, basis)) for basis in bases
    }
    if reference in spent:
        claims["savings"] = saving_claims(spent, reference)
    return {
        "command": command,
        **measured_on(PACKAGES),
        "experiment": experiment.model_dump(mode="json"),
        "complete": len(results) == len(experiment.runs),
        "accuracy": {basis: _accuracy(scores_of(experiment, results, basis)) for basis in bases},
        "spent": spent,
        "time_over_largest_fixed": ratios,
        "answer_gflop": {str(count): value for count, value in gflop.items()},
        "claims": {key: [claim.to_json() for claim in found] for key, found in claims.items()},
        "runs": [{**vars(run), **result} for run, result in results.items()],
    }


def _accuracy(scores: Scores) -> dict[str, Any]:
    """Level of detail -> arm -> count -> mean and interval."""
    return {
        detail: {
            arm: {str(n): scores.mean(arm, n, detail).to_json() for n in scores.counts}
            for arm in scores.arms
        }
        for detail in scores.details
    }


def spent_of(experiment: ExperimentSettings, results: Results) -> dict[str, dict[str, float]]:
    """Arm -> what its runs at equal samples took, in the mean over seeds."""
    spent: dict[str, dict[str, float]] = {}
    for arm in experiment.arms:
        own = [
            result for run, result in results.items() if (run.arm, run.basis) == (arm, "samples")
        ]
        if own:
            keys = ("steps", *SUMS, "training_s")
            spent[arm] = {key: sum(r[key] for r in own) / len(own) for key in keys}
    return spent


def largest_fixed(experiment: ExperimentSettings) -> str:
    """The arm fixed at the largest count, with which savings are compared; "" without any."""
    fixed = {arm.fixed: name for name, arm in experiment.arms.items() if arm.fixed}
    return fixed[max(fixed)] if fixed else ""
