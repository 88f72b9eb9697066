"""This trainer's model and engine on padded rows: its plan's steps, or samples of like length.

torchrun --nproc-per-node 2 -m training.bench.padded_arm FOLDER OUT.json [--grouped]
"""

import argparse
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

from data_pipeline.plan import PackPlan
from training import exit_codes
from training.bench.arm_record import ArmRecord, ArmStep
from training.bench.bench_workload import batch_size, open_workload
from training.bench.held_out_rows import HeldOutRows, token_loss_sum
from training.bench.padded_rows import padded_rows
from training.bench.planned_samples import EpochPlan, grouped_by_length, plan_of
from training.bench.timed_engine import TimedEngine
from training.config import RunConfig
from training.distributed import Ranks, all_reduce_sum
from training.model.build import DTYPES
from training.model.projector_choice import choose_projector
from training.zero3.engine import build_engine
from training.zero3.process_group import init_distributed, quiet_libraries


def run(folder: Path, out: Path, grouped: bool) -> int:
    """Train the workload in `folder`, and write what was noted to `out`."""
    quiet_libraries()
    config = open_workload(folder)
    ranks = init_distributed(config.faults.startup_timeout_s, on_cpu=True)
    plan, record, held_out = plan_of(config), ArmRecord(), HeldOutRows(config, folder)
    inner = build_engine(config, plan.corpus.tokenizer, ranks)
    projector: Any = inner.module.projector
    projector.impl, _ = choose_projector(
        config.train.projector_impl, ranks, DTYPES[config.train.precision]
    )
    record.held_out_before = held_out.score(inner, token_loss_sum(inner))
    timed = TimedEngine(inner)
    steps = [list(step.packs) for step in plan.steps]
    if grouped:
        batch = batch_size(folder)
        steps = grouped_by_length(plan.samples, batch, ranks.world_size, config.seed)
    record.began = time.perf_counter()
    for step in _trained(timed, [step[ranks.rank] for step in steps], plan, config, ranks):
        record.end_step(step)
        step.compute = timed.ends[-1].compute
    record.held_out_after = held_out.score(inner, token_loss_sum(inner))
    record.write(out, ranks.is_main)
    return exit_codes.OK


def _trained(
    engine: TimedEngine, packs: Sequence[PackPlan], plan: EpochPlan, config: RunConfig, ranks: Ranks
) -> Iterator[ArmStep]:
    """An optimizer step on each of this rank's packs, as rows."""
    chunks = -(-config.data.pack.max_tokens // config.train.loss_chunk_tokens)
    for pack, rows in _prefetched(packs, plan, config):
        real = int(rows["attention_mask"].sum()) * bool(len(pack.sample_ids))
        supervised = int((rows["labels"] >= 0).sum())
        (total,) = all_reduce_sum([float(supervised)], ranks.device)
        output = engine(**rows, loss_chunks=chunks)
        engine.backward(output.loss * (ranks.world_size / total), last=True)
        engine.step()
        samples, slots = pack.sample_ids.tolist(), rows["input_ids"].numel()
        yield ArmStep(samples, real, slots, supervised, float(output.loss.detach()) / total)


def _prefetched(
    packs: Sequence[PackPlan], plan: EpochPlan, config: RunConfig
) -> Iterator[tuple[PackPlan, dict[str, Any]]]:
    """The rows of each pack, built ahead by as many threads as the trainer's loader has."""
    loader, pad_id = config.data.loader, plan.corpus.tokenizer.pad_id

    def build(pack: PackPlan) -> tuple[PackPlan, dict[str, Any]]:
        return pack, padded_rows(plan.corpus.builder.build(pack), pad_id)

    with ThreadPoolExecutor(loader.threads) as pool:
        begun = (pool.submit(build, pack) for pack in packs)
        waiting = deque(islice(begun, loader.prefetch_steps))
        while waiting:
            built = waiting.popleft().result()
            waiting.extend(islice(begun, 1))
            yield built


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--grouped", action="store_true")
    options = parser.parse_args()
    exit_codes.run_rank(lambda: run(options.folder, options.out, options.grouped))
