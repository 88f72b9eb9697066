"""This trainer as it is: `training.train` on its plan, the calls of its engine timed.

torchrun --nproc-per-node 2 -m training.bench.packed_arm FOLDER OUT.json
"""

import sys
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np

import training.train as trainer
from data_pipeline.plan import StepPlan
from training import exit_codes
from training.bench.arm_record import ArmRecord, ArmStep
from training.bench.bench_workload import open_workload
from training.bench.held_out_rows import HeldOutRows, token_loss_sum
from training.bench.planned_samples import EpochPlan, plan_of
from training.bench.timed_engine import TimedEngine
from training.distributed import Ranks
from training.metrics import read_metrics
from training.start import start
from training.zero3.process_group import init_distributed, quiet_libraries


def run(folder: Path, out: Path) -> int:
    """Train the workload in `folder`, and write what was noted to `out`."""
    quiet_libraries()
    config = open_workload(folder)
    config = config.model_copy(update={"output_dir": out.with_suffix(".run")})
    ranks = init_distributed(config.faults.startup_timeout_s, on_cpu=True)
    record, held_out = ArmRecord(), HeldOutRows(config, folder)
    engines: list[TimedEngine] = []

    def timed_start(*args: Any) -> tuple[Any, Any]:
        engine, progress = start(*args)
        record.held_out_before = held_out.score(engine, token_loss_sum(engine))
        engines.append(TimedEngine(engine))
        record.began = time.perf_counter()
        return engines[0], progress

    vars(trainer)["start"] = timed_start
    trainer.train(config, ranks)
    (timed,) = engines
    rows = read_metrics(config.output_dir / "metrics.jsonl")
    record.steps = _steps(plan_of(config), timed, rows, ranks)
    record.memory_gib = timed.ends[-1].memory_gib
    record.held_out_after = held_out.score(timed, token_loss_sum(timed))
    record.write(out, ranks.is_main)
    return exit_codes.OK


def _steps(
    plan: EpochPlan, timed: TimedEngine, rows: list[dict[str, Any]], ranks: Ranks
) -> list[ArmStep]:
    """This rank's steps, from the plan, the engine's times and the run's own metrics."""
    found = []
    mixture = plan.corpus.mixture
    for step, end, row in zip(plan.steps, timed.ends, rows, strict=True):
        if row["data_hash"] != _data_hash(step):
            raise RuntimeError(f"step {row['step']} was not trained on what is planned for it")
        packs = step.packs[ranks.rank :: ranks.world_size]
        samples = [sample for pack in packs for sample in pack.sample_ids.tolist()]
        tokens = sum(pack.tokens for pack in packs)
        found.append(
            ArmStep(
                samples,
                tokens,
                tokens,
                sum(map(mixture.supervised_tokens, samples)),
                row["loss"] if ranks.is_main else 0.0,
                end.end,
                end.compute,
                row["data_wait"] * row["step_s"],
            )
        )
    return found


def _data_hash(step: StepPlan) -> int:
    """What the step's metrics say of its data, by the plan."""
    found = 0
    for pack in step.packs:
        sides = [np.repeat(*pair).tolist() for pair in zip(pack.sides, pack.tiles, strict=True)]
        content = pack.sample_ids.tolist(), [side for own in sides for side in own]
        found += zlib.crc32(repr(content).encode())
    return found


if __name__ == "__main__":
    exit_codes.run_rank(lambda: run(*map(Path, sys.argv[1:])))
