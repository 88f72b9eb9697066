"""Disturb a small run in ten ways, start it again each time, and compare it with a quiet one.

    make chaos
    python -m tests.training.chaos --seed 1 --json chaos.json

Two gloo ranks train the digits task on a small corpus, once undisturbed and once with each fault of
`chaos_faults.FAULTS` at a random step, in random order, started again as slurm/lib.sh would. At the
end every step ever done, each loss, the evaluation and the final weights must be bitwise those of
the undisturbed run; no fault may cost more than the steps since the last save that was finished.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import random
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data_pipeline.chat import ChatSettings
from data_pipeline.index import build_index
from data_pipeline.prepare import prepare_demo
from data_pipeline.tokenizer import load_tokenizer
from tests.training.chaos_faults import FAULTS, Fault
from tests.training.chaos_ranks import EVERY, RANKS, Job, Start
from training.checkpoint import finished, layout
from training.metrics import read_metrics
from training.record import PACKAGES, machine

TIMES = {"step_s", "data_wait", "memory_gib"}
COLUMNS = ("fault", "at step", "exit codes", "job ended after", "resumed at", "steps lost")


def disturb(
    corpus: Path, folder: Path, faults: list[Fault], chance: random.Random
) -> list[dict[str, Any]]:
    """Train undisturbed and with these faults; a row per fault, in the order they struck.

    Raises:
        AssertionError: something was not as it must be.
    """
    last = EVERY * (3 + len(faults))
    quiet, job = Job(corpus, folder / "quiet", last), Job(corpus, folder / "chaos", last)
    bar = tqdm(total=len(faults) + 2, unit="start", disable=None)
    try:
        bar.set_description("undisturbed")
        codes = quiet.start().finish()
        assert codes == [0] * RANKS, quiet.starts[0].said()
        bar.update()
        rows = []
        for number, fault in enumerate(chance.sample(faults, len(faults))):
            bar.set_description(fault.name)
            step = EVERY * (2 + number) + chance.randint(1, EVERY - 1)
            rows.append(survive(job, fault, step, chance))
            bar.update()
        bar.set_description("to the end")
        codes = job.start().finish()
        assert codes == [0] * RANKS, job.starts[-1].said()
        bar.update()
    finally:
        quiet.close()
        job.close()
        bar.close()
    for row, start in zip(rows, job.starts[1:], strict=True):
        settle(row, start)
    compare(quiet, job)
    return rows


def survive(job: Job, fault: Fault, step: int, chance: random.Random) -> dict[str, Any]:
    """Start the job, strike at this step, and do the damage; what is known before the next start."""
    start = job.start()
    start.wait_until(lambda: fault.ready(job, start, step))
    began = time.monotonic()
    rank = fault.strike(start, chance)
    codes = start.finish()
    seconds = time.monotonic() - began
    fault.check(rank, codes, start.said())
    last, saved = start.last_step(), job.saved()
    unfinished = [int(path.name[-8:]) for path in layout.leftovers(job.checkpoints)]
    warning = fault.damage(job.checkpoints, chance) if fault.damage else ""
    if fault.saves:
        assert saved[-1] == last, f"{fault.name}: step {last} done, newest checkpoint {saved}"
    return {
        "fault": fault.name,
        "rank": rank,
        "step": last,
        "exit_codes": codes,
        "seconds": round(seconds, 2),
        "resume_at": saved[-1 - fault.lost_checkpoints],
        "most_lost": most_lost(fault, last, unfinished),
        "warning": warning,
    }
