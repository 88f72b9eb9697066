"""Experiments on token counts: statistics, claims in words, runs that go on, a real run."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from training.experiments.flexibility import __main__ as command
from training.experiments.flexibility import experiment_runs
from training.experiments.flexibility.experiment_runs import ExperimentRuns
from training.experiments.flexibility.experiment_settings import (
    ArmRun,
    arm_overrides,
    load_experiment,
)
from training.experiments.flexibility.flexibility_record import make_record
from training.experiments.flexibility.flexibility_tables import accuracy_table, markdown
from training.experiments.flexibility.paper_claims import (
    FAILED,
    HELD,
    OPEN,
    UNTESTED,
    accuracy_claims,
    saving_claims,
)
from training.experiments.flexibility.seed_statistics import Scores, SeedInterval

ROOT = Path(__file__).parents[2]


def experiment_file(folder: Path, **changes: Any) -> Path:
    """A YAML file of a tiny experiment on the grids of colours."""
    grid = folder / "grid"
    content = {
        "out": str(folder / "runs"),
        "base": str(ROOT / "training/configs/grid.yaml"),
        "settings": [
            f"data.prepare={{format: grid, out: {grid}, train_samples: 96, eval_samples: 12}}",
            f"data.shards=[{grid}/train]",
            f"data.eval_shards=[{grid}/eval]",
            f"data.tokenizer={grid}/tokenizer.model",
            "data.pack.window_samples=96",
            "model.llm.config.num_hidden_layers=1",
            "model.vision.config.num_hidden_layers=1",
        ],
        "seeds": [3],
        "counts": [4, 9, 16],
        "epochs": 1,
        "samples_per_step": 32,
        "arms": {"fixed 16": {"draw": {16: 1}}, "both": {"draw": {4: 1, 16: 1}}},
    }
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(content | changes, sort_keys=False))
    return path


# Student's t at 0.975, from a printed table, not from the library that the code takes it from.
@pytest.mark.parametrize(
    ("values", "t", "deviation"),
    [([0.5, 0.6, 0.7], 4.302653, 0.1), ([1.0, 3.0], 12.706205, 2**0.5), ([2.0] * 4, 3.182446, 0.0)],
)
def test_an_interval_is_students(values: list[float], t: float, deviation: float) -> None:
    found = SeedInterval.of(values)
    half = t * deviation / len(values) ** 0.5
    assert found.mean == pytest.approx(sum(values) / len(values))
    assert found.low is not None and found.high is not None
    assert (found.low, found.high) == pytest.approx((found.mean - half, found.mean + half))


def test_one_seed_has_no_interval() -> None:
    assert (found := SeedInterval.of([0.25])).low is None and found.n == 1
    assert "once" in found.points()


def rows(accuracies: dict[int, float]) -> list[dict[str, Any]]:
    return [
        {"detail": "all", "num_image_tokens": count, "accuracy": accuracy}
        for count, accuracy in accuracies.items()
    ]


def made_up(stochastic: tuple[float, ...], seeds: int = 3, unseen: float = 0.88) -> Scores:
    """Fixed at 4 and 16, and an arm that draws both, seed by seed a little apart."""
    evaluations = {}
    for seed in range(seeds):
        more = 0.01 * seed
        evaluations["fixed 4", seed] = rows({4: 0.60 + more, 9: 0.3, 16: 0.3 + more})
        evaluations["fixed 16", seed] = rows({4: 0.2 + more, 9: 0.3, 16: 0.90 + more})
        evaluations["flex", seed] = rows({4: stochastic[seed], 9: unseen, 16: 0.85 + more})
    return Scores(evaluations, {"fixed 4": [4], "fixed 16": [16], "flex": [4, 16]})


def verdicts(scores: Scores) -> dict[tuple[str, str], str]:
    return {(claim.arm, claim.says): claim.verdict for claim in accuracy_claims(scores)}


def test_claims_are_decided_by_paired_intervals() -> None:
    # Seed by seed 3 points above fixed 4, although the seeds spread by 2: unpaired it were open.
    found = verdicts(made_up((0.63, 0.64, 0.65)))
    assert found["flex", "above fixed 4 at its own 4 tokens"] == HELD
    assert found["flex", "above fixed 16 at its own 16 tokens"] == FAILED
    assert found["fixed 4", "collapses at 16 tokens, against the arms trained there"] == HELD
    assert found["fixed 16", "collapses at 4 tokens, against the arms trained there"] == HELD


def test_what_the_seeds_do_not_decide_stays_open() -> None:
    found = verdicts(made_up((0.50, 0.70, 0.68)))
    assert found["flex", "above fixed 4 at its own 4 tokens"] == OPEN
    assert set(verdicts(made_up((0.63,), seeds=1)).values()) == {UNTESTED}


def test_an_experiment_that_is_not_complete_claims_what_it_can() -> None:
    evaluations = {("a", 0): rows({4: 0.6, 16: 0.3}), ("b", 1): rows({4: 0.2, 16: 0.9})}
    assert accuracy_claims(Scores(evaluations, {"a": [4], "b": [16], "c": [4, 16]})) == []


@pytest.mark.parametrize(("unseen", "verdict"), [(0.66, HELD), (0.30, FAILED)])
def test_an_unseen_count_is_held_against_the_drawn_one_below(unseen: float, verdict: str) -> None:
    found = verdicts(made_up((0.63, 0.64, 0.65), unseen=unseen))
    (claim,) = [key for key in found if "never drawn" in key[1]]
    assert "at 9 tokens" in claim[1] and found[claim] == verdict


def test_savings_are_those_over_the_largest_fixed_arm() -> None:
    spent = {
        "fixed 16": {"image_tokens": 200.0, "flops": 10.0, "time": 2.0},
        "flex": {"image_tokens": 144.0, "flops": 11.0},
    }
    found = {claim.says: (claim.found, claim.verdict) for claim in saving_claims(spent, "fixed 16")}
    assert found == {
        "fewer vision tokens in training than fixed 16": ("-28 %", HELD),
        "fewer FLOPs in training than fixed 16": ("+10 %", FAILED),
    }


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"counts": [4, 9]}, ["arms.fixed 16", "[16]", "counts"]),
        ({"arms": {"one": {"draw": {16: 1}}}}, ["arms"]),
        ({"arms": {"a b": {"draw": {4: 1}}, "a-b": {"draw": {16: 1}}}}, ["a-b", "names apart"]),
        ({"arms": {"a": {"draw": {5: 1}}, "b": {"draw": {16: 1}}}}, ["5", "squares"]),
        ({"arms": {"a": {"draw": {4: 0}}, "b": {"draw": {16: 1}}}}, ["above 0"]),
        ({"budget": "flex"}, ["'flex'", "fixed 16, both"]),
        ({"seeds": [1, 1]}, ["seeds", "twice"]),
        ({"base": "nowhere.yaml"}, ["nowhere.yaml", "not a file"]),
        ({"epoch": 1}, ["epoch", "epochs"]),
    ],
)
def test_bad_settings_are_one_error(
    changes: dict[str, Any], named: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert command.main([str(experiment_file(tmp_path, **changes)), "--list"]) == 2
    said = capfd.readouterr().err
    assert said.startswith("error: ") and all(word in said for word in named), said
    assert "Traceback" not in said


def test_an_arm_is_evaluated_at_every_count_and_its_settings_come_last(tmp_path: Path) -> None:
    arms = {"a": {"draw": {16: 3, 4: 1}, "settings": ["model.pool=resize"]}, "b": {"draw": {9: 1}}}
    experiment = load_experiment(experiment_file(tmp_path, arms=arms))
    found = arm_overrides(experiment, experiment.arms["a"])
    assert found[-3:] == [
        "data.tokens.counts=[4, 9, 16]",
        "data.tokens.probabilities=[0.25, 0.0, 0.75]",
        "model.pool=resize",
    ]


class FakeTrainer:
    """In place of the trainer's process: notes its overrides, and leaves what it would."""

    def __init__(self, codes: list[int]) -> None:
        self.codes, self.seen = codes, []

    def __call__(self, base: str, overrides: list[str], ranks: int, log: Path, *more: Any) -> int:
        settings = dict(override.split("=", 1) for override in overrides)
        self.seen.append(settings)
        code = self.codes.pop(0) if self.codes else 0
        log.write_text("error: of the fake\n")
        if code == 0:
            row = {"step": 1, "loss": 1.0, "step_s": 1.0, "samples": 96, "tiles": 96}
            row |= {"tokens": 9, "image_tokens": 5, "hardware_flops": 1.0}
            flops = 200.0 if "both" in settings["output_dir"] else 100.0
            steps = [{**row, "step": step, "flops": flops} for step in (1, 2, 3)]
            (log.parent / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
            (log.parent / "evaluation.json").write_text(
                json.dumps({"step": 3, "results": rows({4: 0.5, 9: 0.6, 16: 0.7})})
            )
        return code


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> FakeTrainer:
    fake = FakeTrainer([])
    monkeypatch.setattr(experiment_runs, "launch", fake)
    return fake


def test_arms_share_seed_order_and_samples_and_only_differ_in_counts(
    tmp_path: Path, trainer: FakeTrainer
) -> None:
    assert command.main([str(experiment_file(tmp_path))]) == 0
    first, second = trainer.seen
    different = {key for key in first | second if first.get(key) != second.get(key)}
    assert different == {"data.tokens.probabilities", "data.pack.max_tokens", "output_dir"}
    assert first["seed"] == "3" and first["train.epochs"] == "1.0"
    # 12 vision tokens a sample less in half of the samples, 16 samples a pack.
    tokens = [int(seen["data.pack.max_tokens"]) for seen in (first, second)]
    assert tokens[0] - tokens[1] == pytest.approx(16 * 6, abs=25)


def test_a_nested_arm_gets_packs_for_all_copies_of_its_samples(
    tmp_path: Path, trainer: FakeTrainer
) -> None:
    nested = {"draw": {4: 1, 16: 1}, "settings": ["data.tokens.schedule=nested"]}
    arms = {"fixed 4": {"draw": {4: 1}}, "fixed 16": {"draw": {16: 1}}, "nested": nested}
    assert command.main([str(experiment_file(tmp_path, arms=arms))]) == 0
    tokens = [int(seen["data.pack.max_tokens"]) for seen in trainer.seen]
    assert tokens[2] == pytest.approx(tokens[0] + tokens[1], abs=1)
    assert trainer.seen[2]["data.tokens.schedule"] == "nested"


def test_equal_compute_scales_the_steps_by_what_they_cost(
    tmp_path: Path, trainer: FakeTrainer
) -> None:
    assert command.main([str(experiment_file(tmp_path, budget="both"))]) == 0
    assert [seen.get("train.steps") for seen in trainer.seen] == [None, None, "6"]
    record = json.loads((tmp_path / "runs" / "flexibility.json").read_text())
    assert record["complete"] and set(record["accuracy"]) == {"samples", "compute"}
    # The budget's own run is one of those at equal compute.
    assert set(record["accuracy"]["compute"]["all"]) == {"fixed 16", "both"}
    assert (tmp_path / "runs" / "flexibility_tokens.png").is_file()


def test_a_finished_run_is_not_run_again_and_a_failed_one_is(
    tmp_path: Path, trainer: FakeTrainer, capfd: pytest.CaptureFixture[str]
) -> None:
    path = str(experiment_file(tmp_path))
    assert command.main([path, "--out", str(tmp_path / "elsewhere")]) == 0
    assert all("elsewhere" in seen["output_dir"] for seen in trainer.seen)
    trainer.codes, trainer.seen = [0, 1], []
    assert command.main([path]) == 1
    assert "both, seed 3" in (said := capfd.readouterr().err) and "of the fake" in said
    assert command.main([path]) == 0
    assert ["both" in seen["output_dir"] for seen in trainer.seen] == [False, True, True]
    assert command.main([path, "--report"]) == 0 and len(trainer.seen) == 3


def test_a_folder_of_other_settings_is_refused(
    tmp_path: Path, trainer: FakeTrainer, capfd: pytest.CaptureFixture[str]
) -> None:
    assert command.main([str(experiment_file(tmp_path))]) == 0
    assert command.main([str(experiment_file(tmp_path, samples_per_step=48))]) == 2
    assert "other settings" in capfd.readouterr().err and len(trainer.seen) == 2


def test_equal_compute_alone_says_what_must_run_first(
    tmp_path: Path, trainer: FakeTrainer, capfd: pytest.CaptureFixture[str]
) -> None:
    path = str(experiment_file(tmp_path, budget="both"))
    assert command.main([path, "--run", "2"]) == 1
    assert "both, seed 3, equal samples" in capfd.readouterr().err
    assert command.main([path, "--run", "3"]) == 2


def test_a_run_that_is_ended_saves_and_goes_on(tmp_path: Path) -> None:
    """One real arm: asked to stop it saves, and the same runs resume it to the end."""
    experiment = load_experiment(experiment_file(tmp_path))
    command.prepare_corpus(command.load_config(experiment.base, experiment.settings).data)
    run = ArmRun("both", 3, "samples")
    folder = experiment.out / run.folder

    def stepping() -> bool:
        metrics = folder / "metrics.jsonl"
        return metrics.is_file() and metrics.read_text().count("\n") >= 1

    runs = ExperimentRuns(experiment, stepping)
    assert runs.run_all([run], 1) == [] and runs.result(run) is None
    assert list((folder / "checkpoints").glob("step-*"))
    runs = ExperimentRuns(experiment, lambda: False)
    assert runs.run_all([run], 1) == []
    result = runs.result(run)
    assert result and result["samples"] == 96 and result["image_tokens"] > 0
    assert {row["num_image_tokens"] for row in result["evaluation"]} == {4, 9, 16}
    assert (folder / "train.log").read_text().count("world size 1") == 2


def test_the_record_becomes_tables(tmp_path: Path) -> None:
    experiment = load_experiment(experiment_file(tmp_path, seeds=[0, 1]))
    row = {"steps": 3, "samples": 96, "tiles": 96, "tokens": 9, "hardware_flops": 1.0}
    row |= {"training_s": 3.0}
    results = {
        ArmRun(arm, seed, "samples"): {
            **row,
            "image_tokens": 5.0,
            "flops": 2e12,
            "evaluation": rows({4: 0.5 + seed / 100, 9: 0.6, 16: 0.7}),
        }
        for arm in experiment.arms
        for seed in (0, 1)
    }
    record = make_record(experiment, results, [], {4: 0.1, 9: 0.2, 16: 0.3}, "the command")
    lines = accuracy_table(record, "samples", "all").splitlines()
    assert lines[0] == "| trained at | 4 | 9 | 16 |"
    assert lines[2] == "| fixed 16 | 50.5 ± 6.4 | 60.0 ± 0.0 | **70.0** ± 0.0 |"
    assert lines[3].startswith("| both | **50.5** ± 6.4 | 60.0 ")
    assert "2.00" in markdown(record) and "fewer vision tokens" in markdown(record)


def test_slurm_submits_the_runs_as_arrays_behind_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = tmp_path / "python"
    lines = [
        "0 a, seed 0, equal samples",
        "1 b, seed 0, equal samples",
        "2 b, seed 0, equal compute",
    ]
    listing.write_text("#!/bin/sh\nprintf '%s\\n' " + " ".join(f"'{line}'" for line in lines))
    listing.chmod(0o755)
    monkeypatch.setenv("PYTHON", str(listing))
    preset = "training/configs/experiments/flexibility_cpu.yaml"
    said = subprocess.run(
        ["slurm/flexibility.sh", "--dry-run", "--gpus=1", preset],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    script = f"slurm/flexibility.sh {preset}"
    wait = "--dependency=afterok:JOB_OF_{} --kill-on-invalid-dep=yes"
    assert said == [
        f"sbatch --parsable --gpus=1 --array=0-1 {script}",
        f"sbatch --parsable --gpus=1 --array=2-2 {wait.format('SAMPLES')} {script}",
        f"sbatch --parsable --gpus=1 {wait.format('COMPUTE')} --output=flexibility-%j.out {script}",
    ]


@pytest.mark.parametrize(
    "preset", sorted((ROOT / "training/configs/experiments").glob("flexibility_*.yaml"))
)
def test_presets_evaluate_four_counts_or_more_that_an_arm_does_not_draw(preset: Path) -> None:
    experiment = load_experiment(preset)
    assert len(experiment.seeds) >= 3 and experiment.budget and experiment.timing
    for arm in experiment.arms.values():
        if arm.fixed or len(arm.draw) <= 3:
            assert len(set(experiment.counts) - arm.draw.keys()) >= 4
