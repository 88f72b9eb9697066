"""The runs of an experiment: each a process of the trainer, which goes on where it was ended."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from data_pipeline.errors import InputError
from data_pipeline.files import write_atomically
from training import exit_codes
from training.config import load_config
from training.experiments.flexibility.equal_packs import SampleSizes
from training.experiments.flexibility.experiment_settings import (
    ArmRun,
    ExperimentSettings,
    arm_overrides,
)
from training.metrics import read_metrics

RESULT, LOG = "result.json", "train.log"
SUMS = ("samples", "tiles", "tokens", "image_tokens", "flops", "hardware_flops")
_POLL_S = 0.2
_TAIL = 600


class ExperimentRuns:
    """Runs what is not done, and knows what is.

    Args:
        experiment: its base config's data must be there (`training.run.prepare_corpus`).
        stop: whether to end, leaving each run at its newest checkpoint.
    """

    def __init__(self, experiment: ExperimentSettings, stop: Callable[[], bool]) -> None:
        self.experiment, self.stop = experiment, stop
        sizes = SampleSizes(experiment)
        self._pack_tokens = {name: sizes.pack_tokens(arm) for name, arm in experiment.arms.items()}

    def folder(self, run: ArmRun) -> Path:
        """The run's output_dir."""
        return self.experiment.out / run.folder

    def result(self, run: ArmRun) -> dict[str, Any] | None:
        """What a finished run measured; None of one that has not finished.

        Raises:
            InputError: the folder holds a run with other settings.
        """
        path = self.folder(run) / RESULT
        if not path.is_file():
            return None
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if found["settings"] != self._digest(run):
            raise InputError(
                f"{path.parent} holds a run of other settings than this experiment's {run}: give "
                "another `out`, or remove that folder"
            )
        return found

    def overrides(self, run: ArmRun) -> list[str]:
        """The run's changes to the base config.

        Raises:
            InputError: what its length depends on has not been run yet.
        """
        experiment = self.experiment
        common = [
            *arm_overrides(experiment, experiment.arms[run.arm]),
            f"data.pack.max_tokens={self._pack_tokens[run.arm]}",
            f"seed={run.seed}",
            f"output_dir={self.folder(run)}",
        ]
        if run.basis == "samples":
            return [*common, f"train.epochs={experiment.epochs}"]
        return [*common, f"train.steps={self._equal_compute_steps(run)}"]

    def _equal_compute_steps(self, run: ArmRun) -> int:
        """Steps for which the arm costs the FLOPs of the budget's arm at equal samples."""
        assert self.experiment.budget is not None
        needed = [ArmRun(arm, run.seed, "samples") for arm in (self.experiment.budget, run.arm)]
        budget, own = (self.result(other) for other in needed)
        if budget is None or own is None:
            raise InputError(
                f"{run} depends on what {needed[0]} and {needed[1]} cost: run these first"
            )
        return max(1, round(own["steps"] * budget["flops"] / own["flops"]))

    def _digest(self, run: ArmRun) -> str:
        """Hex digest of all the settings of a run, wherever they stand."""
        config = load_config(self.experiment.base, self.overrides(run))
        text = json.dumps(config.model_dump(mode="json", exclude={"output_dir"}), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def run_all(self, runs: list[ArmRun], jobs: int) -> list[str]:
        """Run them, `jobs` side by side; returns what failed, in words.

        A run that fails does not end the others. InputError for a folder of another experiment.
        """
        for run in runs:
            if run.basis == "samples":
                self.result(run)
        slots: SimpleQueue[int] = SimpleQueue()
        for slot in range(jobs):
            slots.put(slot)
        failures: list[str] = []

        def work(number: int, run: ArmRun) -> None:
            slot = slots.get()
            try:
                if not self.stop():
                    self._run(run, f"[{number}/{len(runs)}]", slot)
            except InputError as error:
                failures.append(str(error))
            finally:
                slots.put(slot)

        with ThreadPoolExecutor(jobs) as pool:
            for basis in ("samples", "compute"):
                numbered = [(i, run) for i, run in enumerate(runs, 1) if run.basis == basis]
                list(pool.map(lambda item: work(*item), numbered))
                if failures:
                    break
        return failures

    def _run(self, run: ArmRun, place: str, slot: int) -> None:
        """One run, unless it is done; InputError where it fails."""
        if self.result(run):
            print(f"{place} {run}: done before", flush=True)
            return
        folder, began = self.folder(run), time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        print(f"{place} {run}: begins, log {folder / LOG}", flush=True)
        code = launch(
            self.experiment.base,
            self.overrides(run),
            self.experiment.ranks,
            folder / LOG,
            self.stop,
            slot,
        )
        if self.stop():
            print(f"{place} {run}: stopped; the same command goes on with it", flush=True)
            return
        if code != exit_codes.OK:
            raise InputError(f"{run} ended with exit code {code}: {log_end(folder / LOG)}")
        result = {"settings": self._digest(run), **measured(folder)}
        write_atomically(folder / RESULT, json.dumps(result, indent=1).encode())
        print(
            f"{place} {run}: {result['steps']} steps, {time.monotonic() - began:.0f} s", flush=True
        )


def launch(
    base: str,
    overrides: list[str],
    ranks: int,
    log: Path,
    stop: Callable[[], bool],
    slot: int = 0,
) -> int:
    """Run the trainer to its end; returns its exit code. Asked to stop, it saves and ends.

    slot: which of the runs side by side it is; on a machine with several GPUs each has its own.
    """
    trainer = ["-m", "training.train", base, *overrides]
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *(several if ranks > 1 else []), *trainer]
    with log.open("ab") as file:
        process = subprocess.Popen(
            command,
            env=os.environ | _own_gpus(ranks, slot),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            process_group=0,  # a Ctrl-C here is handed on once, by us
        )
        asked = False
        try:
            while process.poll() is None:
                if stop() and not asked:
                    asked = True
                    os.killpg(process.pid, signal.SIGTERM)
                time.sleep(_POLL_S)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


def _own_gpus(ranks: int, slot: int) -> dict[str, str]:
    """The GPUs of a slot, where there are enough for several; else those that all see."""
    import torch  # late: it takes seconds

    number = torch.cuda.device_count()
    if number < 2 * ranks:
        return {}
    first = slot * ranks % (number - number % ranks)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(number)]
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[first : first + ranks])}


def log_end(log: Path) -> str:
    """Its error line, or else its last lines, and where it is."""
    text = log.read_text(encoding="utf-8", errors="replace").strip()
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    said = errors[-1].removeprefix("error: ") if errors else text[-_TAIL:]
    return f"{said} (log {log})"


def measured(folder: Path) -> dict[str, Any]:
    """What a finished run has done and found."""
    rows = read_metrics(folder / "metrics.jsonl")
    evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    return {
        "steps": len(rows),
        **{key: sum(row[key] for row in rows) for key in SUMS},
        "training_s": sum(row["step_s"] for row in rows),
        "evaluation": evaluation["results"],
    }
