"""One training stage: a model from random weights, mixed token counts against one, step by step.

    python -m training.gpu_record.training_speed SHAPE --out FILE.json --work FOLDER [--offload]
    python -m training.gpu_record.training_speed SHAPE ... --counts mixed --set KEY=VALUE

The trainer's own data, model, ZeRO-3 engine and step on one GPU, without checkpoints. The file is
written after every step. Where the GPU's memory does not suffice the exit code is that of
`exit_codes.OUT_OF_MEMORY`.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from data_pipeline.cli import command_parser
from data_pipeline.errors import InputError
from data_pipeline.files import write_atomically
from data_pipeline.loader import StepBatch
from data_pipeline.machine import measured_on
from data_pipeline.paths import path_argument
from data_pipeline.plan import PlanState
from training import exit_codes
from training.config import OFFLOAD_OPTIMIZER, ProfileSettings
from training.engine_interface import Engine
from training.flops import peak_flops
from training.gpu_record.insertion_cost import insertion_ms
from training.gpu_record.shapes import SHAPES, Shape
from training.health import LossGuard
from training.metrics import StepMeter
from training.model.build import DTYPES
from training.precision import settle_precision
from training.profiling import StepProfiler, phase
from training.profiling.phase_table import phase_times, read_trace
from training.record.run_record import PACKAGES
from training.run import Run
from training.speed import check_machine, check_settings, make_faster
from training.step import shared_denominator, train_step
from training.zero3.engine import build_engine
from training.zero3.process_group import init_distributed, quiet_libraries

COUNTS = ("mixed", "fixed")
KEPT = (
    *("step_s", "tokens", "images", "tiles", "samples", "padding", "data_wait", "loss"),
    *("mfu", "hfu"),
)


def measure(
    shape: Shape, work: Path, more: tuple[str, ...], out: Path, kinds: tuple[str, ...] = COUNTS
) -> None:
    """Train with these kinds of counts, and write what was measured to `out` after every step."""
    shape.prepare(work)
    config = shape.config(work, kinds[0], more)
    check_settings(config)
    ranks = init_distributed(config.faults.startup_timeout_s, config.train.device == "cpu")
    check_machine(config, ranks)
    configs = [shape.config(work, counts, more) for counts in kinds]
    runs = [Run(settle_precision(config, ranks), ranks) for config in configs]
    began = time.perf_counter()
    engine = build_engine(runs[0].config, runs[0].tokenizer, ranks, pretrained=False)
    projector: Any = engine.module.projector
    projector.impl = runs[0].projector_impl
    make_faster(engine.module, runs[0].config)
    engine.train()
    sizes = [engine.shape(parameter) for parameter in engine.module.parameters()]
    found: dict[str, Any] = {
        "command": " ".join(["python", "-m", "training.gpu_record.training_speed", *sys.argv[1:]]),
        **measured_on((*PACKAGES, "triton")),
        "parameters": sum(torch.Size(size).numel() for size in sizes),
        "built_in_s": round(time.perf_counter() - began, 1),
        "settings": runs[0].config.model_dump(mode="json"),
        "projector": runs[0].projector_impl,
        "projector_obstacle": runs[0].projector_obstacle,
        "runs": {},
    }
    for counts, run in zip(kinds, runs, strict=True):
        _train(shape, run, engine, found["runs"].setdefault(counts, {}), lambda: _write(out, found))
    if kinds == COUNTS:
        found["mixed_over_fixed"] = _ratios(*(found["runs"][counts] for counts in COUNTS))
    _write(out, found | {"complete": True})


def _train(shape: Shape, run: Run, engine: Engine, found: dict[str, Any], write: Any) -> None:
    """Steps with one kind of counts: their rows, what they give together, a traced one, insertion.

    The traced step comes last, and counts for none of the rates.
    """
    data, device = run.config.data, run.ranks.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    guard, peak = LossGuard(run.config.faults), peak_flops(device, run.config.train.precision)
    meter = StepMeter(
        data.tokens.sides, data.pack.max_tokens, run.ranks, run.mixture.names, run.pack_cost, peak
    )
    found |= {"counts": data.tokens.counts, "steps": []}
    batches, traced = run.loader.steps(PlanState()), shape.warmup + shape.steps + 1
    folder = run.config.output_dir / "-".join(map(str, data.tokens.counts))
    profiler = StepProfiler(ProfileSettings(steps=(traced, traced)), folder, run.ranks)
    for step in range(1, traced + 1):
        profiler.begins(step)
        meter.start()
        with phase("data"):
            batch = next(batches)
        denominator = shared_denominator(batch, False, run.ranks)
        assert denominator is not None
        metrics = train_step(engine, batch, denominator, step, meter, run, guard)
        profiler.done(step)
        run.say(f"step {step}: {metrics['step_s']:.2f} s, {metrics['tokens_per_s']:.0f} tokens/s")
        if shape.warmup < step < traced:
            found["steps"].append({key: metrics[key] for key in KEPT if key in metrics})
            found["together"] = _together(found["steps"], metrics["memory_gib"], shape.packs)
            write()
    profiler.close()
    batches.close()
    found["phases"] = _phases(folder)
    found["insertion"] = _insertion(run, batch, found["together"]["step_s"], shape.packs)
    write()


def _together(rows: list[dict[str, Any]], memory_gib: float, packs: int) -> dict[str, float]:
    """Rates over all measured steps, means per step, peak memory since the first."""
    seconds = sum(row["step_s"] for row in rows)
    found = {"packs": packs, "memory_gib": memory_gib, "step_s": seconds / len(rows)}
    for what in ("tokens", "images", "tiles", "samples"):
        found[f"{what}_per_s"] = sum(row[what] for row in rows) / seconds
    for share in ("data_wait", "mfu", "hfu"):  # shares of a step's time
        if share in rows[0]:
            found[share] = sum(row[share] * row["step_s"] for row in rows) / seconds
    found["padding"] = sum(row["padding"] for row in rows) / len(rows)
    return {key: float(f"{value:.5g}") for key, value in found.items()}


def _phases(folder: Path) -> dict[str, dict[str, float]]:
    """Milliseconds of each phase in the traced step; empty where it could not be traced."""
    times = {}
    for path in folder.glob("profile/*.trace.json.gz"):
        times = phase_times(read_trace(path))
    return {
        name: {
            "host_ms": round(time.host_us / 1e3, 3),
            "gpu_ms": round(time.gpu_us / 1e3, 3),
        }
        for name, time in times.items()
    }


def _insertion(run: Run, batch: StepBatch, step_s: float, packs: int) -> dict[str, float]:
    """Both ways of inserting a pack's image features, and the share of a step they take."""
    ids = batch.packs[0].input_ids
    mask = ids == run.tokenizer.special_id("<IMG_CONTEXT>")
    width = int(run.config.model.llm.config["hidden_size"])
    found = insertion_ms(mask, width, DTYPES[run.config.train.precision], run.ranks.device)
    shares = {
        name.replace("_ms", "_share_of_step"): ms / 1e3 * packs / step_s
        for name, ms in found.items()
    }
    return {"rows": len(ids), "image_tokens": int(mask.sum()), "width": width} | found | shares


def _ratios(mixed: dict[str, Any], fixed: dict[str, Any]) -> dict[str, float]:
    """How many times as much a second mixed counts process."""
    return {
        key: round(mixed["together"][key] / fixed["together"][key], 4)
        for key in ("tokens_per_s", "images_per_s", "tiles_per_s", "samples_per_s", "memory_gib")
    }


def _write(out: Path, found: dict[str, Any]) -> None:
    write_atomically(out, json.dumps(found, indent=1).encode() + b"\n")


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("training.gpu_record.training_speed", __doc__)
    parser.add_argument("shape", choices=tuple(SHAPES))
    parser.add_argument("--out", type=path_argument, required=True, help="JSON file to write")
    parser.add_argument("--work", type=path_argument, required=True, help="folder for the corpus")
    parser.add_argument("--offload", action="store_true", help="the optimizer in host memory")
    parser.add_argument("--counts", choices=COUNTS, help="only these; both without it")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting; repeat"
    )
    args = parser.parse_args(argv)
    more = (*((OFFLOAD_OPTIMIZER,) if args.offload else ()), *args.set)
    kinds = (args.counts,) if args.counts else COUNTS
    quiet_libraries()
    try:
        measure(SHAPES[args.shape], args.work, more, args.out, kinds)
    except torch.OutOfMemoryError as error:
        print(f"error: out of GPU memory: {str(error).splitlines()[0]}", file=sys.stderr)
        return exit_codes.OUT_OF_MEMORY
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_codes.BAD_INPUT
    torch.distributed.destroy_process_group()
    return exit_codes.OK


if __name__ == "__main__":
    exit_codes.run_rank(main)
