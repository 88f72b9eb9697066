"""Disturb a small run in ten ways, start it again each time, and compare it with a quiet one.

    make chaos
    python -m tests.training.chaos --seed 1 --json chaos.json

Two gloo ranks train the digits task on a small corpus, once undisturbed and once with each fault of
`chaos_faults.FAULTS` at a random step, in random order, started again as slurm/lib.sh would. At the
end every step ever done, each loss, the evaluation and the final weights must be bitwise those of
the undisturbed run; no fault may cost more than the steps since the last save that was finished.
"""

import argparse
import json
import os
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
from data_pipeline.machine import measured_on
from data_pipeline.prepare.demo_corpus import prepare_demo
from data_pipeline.text_table import text_table
from data_pipeline.tokenizer import load_tokenizer
from tests.training.chaos_faults import FAULTS, Fault
from tests.training.chaos_ranks import EVERY, RANKS, Job, Start
from training.checkpoint import finished
from training.metrics import read_metrics
from training.record.run_record import PACKAGES

TIMES = {
    *("step_s", "data_wait", "memory_gib"),
    *("slowest_rank", "slowest_rank_s", "fastest_rank", "fastest_rank_s"),
}
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
    """Start the job, strike once the step is done, then damage; what is known before a restart."""
    start = job.start()
    start.wait_until(
        lambda: start.steps() and start.last_step() >= step and len(start.saved()) >= 2
    )
    began = time.monotonic()
    rank = fault.strike(start, chance)
    codes = start.finish()
    seconds = time.monotonic() - began
    fault.check(rank, codes, start.said())
    last, saved = start.last_step(), start.saved()
    # A save that was cut short is lost, and with it the steps done meanwhile.
    meanwhile = last - min(start.saving(), default=last)
    return {
        "fault": fault.name,
        "rank": rank,
        "step": last,
        "exit_codes": codes,
        "seconds": round(seconds, 2),
        "resumed_at": saved[-1 - fault.lost_checkpoints],
        "most_lost": 0 if fault.asks else EVERY * (1 + fault.lost_checkpoints) + meanwhile,
        "warning": fault.damage(job.checkpoints, chance) if fault.damage else "",
    }


def settle(row: dict[str, Any], following: Start) -> None:
    """Check where the start after a fault went on from; adds `lost`, the steps done again."""
    text = f"{row}\n{following.said()}"
    assert following.resumed_at() == row["resumed_at"], text
    assert re.search(row.pop("warning"), following.said(), re.DOTALL), text
    row["lost"] = row["step"] - row["resumed_at"]
    assert 0 <= row["lost"] <= row.pop("most_lost"), text


def compare(quiet: Job, job: Job) -> None:
    """AssertionError unless the disturbed run is bitwise the undisturbed one."""
    expected, found = metrics(quiet), metrics(job)
    assert [row["step"] for row in found] == list(range(1, len(expected) + 1))
    for one, other in zip(expected, found, strict=True):
        assert one == other, f"undisturbed {one}, disturbed {other}"
    for rank in range(RANKS):
        true = {row["step"]: row for row in quiet.starts[0].steps(rank)}
        for start in job.starts:
            done, first = start.steps(rank), start.resumed_at() + 1
            assert [row["step"] for row in done] == list(range(first, first + len(done)))
            for row in done:
                assert row == true[row["step"]], f"rank {rank} {start.folder.name}: {row}"
    results = [(j.out / "evaluation.json").read_bytes() for j in (quiet, job)]
    assert results[0] == results[1]
    saved = [finished(j.checkpoints)[-1] for j in (quiet, job)]
    assert saved[0].name == saved[1].name
    for shard in sorted(saved[0].glob("*optim_states.pt")):
        both = [tensors(torch.load(p / shard.name, weights_only=False)) for p in saved]
        assert both[0] and len(both[0]) == len(both[1])
        assert all(torch.equal(a, b) for a, b in zip(*both, strict=True)), shard.name


def metrics(job: Job) -> list[dict[str, Any]]:
    """What the job recorded of each step, without what depends on the machine."""
    rows = read_metrics(job.out / "metrics.jsonl")
    return [
        {k: v for k, v in row.items() if k not in TIMES and not k.endswith("_per_s")}
        for row in rows
    ]


def tensors(state: Any) -> list[torch.Tensor]:
    """All tensors of a nested state, in order: weights and moments of the optimizer's shard."""
    if isinstance(state, torch.Tensor):
        return [state]
    items = state.values() if isinstance(state, dict) else state
    nested = isinstance(state, (dict, list, tuple))
    return [tensor for item in items for tensor in tensors(item)] if nested else []


def prepare(folder: Path) -> Path:
    """A small digits corpus."""
    prepare_demo("digits", folder, train_samples=240, eval_samples=24, seed=0)
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    for part in ("train", "eval"):
        build_index(str(folder / part), tokenizer, ChatSettings(system=""))
    return folder


def table(rows: list[dict[str, Any]]) -> str:
    cells = [COLUMNS] + [
        (
            row["fault"],
            str(row["step"]),
            " ".join(map(str, row["exit_codes"])),
            f"{row['seconds']:.1f} s",
            str(row["resumed_at"]),
            str(row["lost"]),
        )
        for row in rows
    ]
    return text_table(cells)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.training.chaos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    # Each rank that is killed leaves tqdm's lock behind.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
    started = time.monotonic()
    print(f"seed {args.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        corpus = prepare(Path(name) / "corpus")
        rows = disturb(corpus, Path(name), FAULTS, random.Random(args.seed))
    seconds = round(time.monotonic() - started, 1)
    lost = sum(row["lost"] for row in rows)
    print(table(rows))
    print(
        f"{len(rows)} faults in {seconds:.0f} s; saved every {EVERY} steps, {lost} done again\n"
        "losses, samples, evaluation and weights are bitwise those of the undisturbed run"
    )
    if args.json:
        result = {
            "seed": args.seed,
            "seconds": seconds,
            "every_steps": EVERY,
            "ranks": RANKS,
            **measured_on(PACKAGES),
            "rows": rows,
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
