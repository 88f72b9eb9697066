"""Runs the arms in turn, round after round; what a run noted is kept, and is not run again."""

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_pipeline.errors import InputError
from training.bench.arms import Arm
from training.bench.bench_workload import BenchWorkload

_TAIL = 600

Runs = dict[str, list[dict[str, Any]]]
"""By arm, what each round's run noted; see `arm_record`."""


def run_rounds(
    arms: Sequence[Arm], rounds: int, workload: BenchWorkload, folder: Path, workers: int
) -> Runs:
    """All runs, those of an earlier call included.

    Raises:
        InputError: a run failed; it names the log.
    """
    todo = [(number, arm) for number in range(1, rounds + 1) for arm in arms]
    bar = tqdm(todo, "runs", unit="run", disable=None, leave=False)
    for number, arm in bar:
        out = noted_file(folder, arm, number)
        if not out.exists():
            bar.set_postfix_str(f"round {number}, {arm.name}")
            _run(arm.command(workload.ranks, workers, folder, out), arm, number, out)
            steps = json.loads(out.read_text(encoding="utf-8"))["steps"]
            tqdm.write(f"round {number}: {arm.name} trained {len(steps)} steps")
    return {
        arm.name: [
            json.loads(noted_file(folder, arm, number).read_text(encoding="utf-8"))
            for number in range(1, rounds + 1)
        ]
        for arm in arms
    }


def noted_file(folder: Path, arm: Arm, number: int) -> Path:
    """What the arm's run of this round wrote."""
    return folder / "rounds" / f"{arm.name}-{number}.json"


def _run(command: list[str], arm: Arm, number: int, out: Path) -> None:
    log = out.with_suffix(".log")
    log.parent.mkdir(exist_ok=True)
    with log.open("wb") as file:
        done = subprocess.run(
            command,
            cwd=Path(__file__).parents[2],
            env=_environment(out.parents[1]),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        )
    shutil.rmtree(out.with_suffix(".run"), ignore_errors=True)  # its checkpoint
    if done.returncode or not out.exists():
        text = log.read_text(encoding="utf-8", errors="replace").strip()[-_TAIL:]
        raise InputError(
            f"{arm.name} ended with exit code {done.returncode} in round {number}; the same "
            f"command goes on with it once that is mended. The end of {log}:\n{text}"
        )


def _environment(folder: Path) -> dict[str, str]:
    """A thread a rank, which two ranks on few cores want; code of models cached in `folder`."""
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder.resolve() / "hub"),
    }
