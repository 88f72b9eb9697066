"""Profile the large parts of a training step at a config's shapes: where does its time go?

    python -m training.step_parts training/configs/digits.yaml --out runs/parts
    python -m training.step_parts CONFIG.yaml --what loss --quick --resume --out runs/loss

Parts: vision (a layer of the tower), projector, attention (of a decoder layer, on the pack's
samples), mlp, norms and loss (logits and cross-entropy), each the trainer's own module with random
weights on one full pack of the plan; without indexed data the pack is drawn. Liger's versions stand
beside them where liger-kernel is installed. On a GPU everything is timed, each part is in the file
when it ends; without one the least times are calculated. --device cpu times this CPU, at small
shapes.
"""

import argparse
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from data_pipeline.cli import add_config_arguments, command_parser
from data_pipeline.errors import InputError
from data_pipeline.paths import path_argument
from kernels.profile.bench import BenchSettings, measure_calls, new_record, noting_failure
from kernels.profile.calculated import assumed
from kernels.profile.compare import check_comparable, compare_table
from kernels.profile.html_report import Report, write_page
from kernels.profile.measured_run import Subject, begin, failures, measure
from kernels.profile.random_inputs import outputs_and_gradients
from kernels.profile.results import RESULTS, SCHEMA, read_results, write_csv, write_json
from kernels.profile.roofline import Peaks
from kernels.profile.run_tables import Table, kernel_table
from kernels.profile.system import describe_machine
from training.config import RunConfig, load_config
from training.model.build import DTYPES
from training.precision import has_fast_bf16
from training.step_parts.liger_parts import liger_missing
from training.step_parts.part_cases import PARTS, PartMaker
from training.step_parts.part_tables import OURS, floor_ms, parts_table, rows_of_parts
from training.step_parts.step_pack import StepPack, find_pack
from training.step_parts.step_part import StepPart

MEASURED, CALCULATED = "measured step", "calculated step"
PER_PART_S = 10.0
MODES = ("forward", "both")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser("training.step_parts", __doc__)
    add_config_arguments(parser)
    add = parser.add_argument
    add("--what", default="all", metavar="PART,..", help=f"all, or of {', '.join(PARTS)}")
    add("--out", type=path_argument, required=True, help="folder for the files")
    add("--device", choices=("auto", "cpu"), default="auto", help="cpu: time this CPU")
    add("--quick", action="store_true", help="a third of the time per part, no traces")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--min-ms", type=float, help="timed per part and mode (100; --quick 30)")
    add("--supervised", type=float, default=0.3, help="of a drawn pack: tokens with a label (0.3)")
    add("--compare", type=path_argument, metavar="OLD", help="a run before: print what changed")
    args = parser.parse_intermixed_args(argv)
    if not 0 < args.supervised <= 1:
        parser.error(f"--supervised is {args.supervised}; expected a share above 0 and up to 1")
    if args.min_ms is not None and not 0 < args.min_ms < float("inf"):
        parser.error(f"--min-ms is {args.min_ms}; expected a number above 0")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 1 where a part failed, 2 for bad input."""
    try:
        return _run(parse_args(argv))
    except (InputError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; --resume goes on", file=sys.stderr)
        return 128 + signal.SIGINT


def _run(args: argparse.Namespace) -> int:
    names = _names(args.what)
    config = load_config(args.config, args.overrides)
    if beside := config.train.adapters.given:
        nulls = " ".join(f"train.adapters.{name}=null" for name in beside)
        raise InputError(f"adapters are among no part that is measured; leave them out: {nulls}")
    old = read_results(args.compare) if args.compare else None
    cuda = torch.cuda.is_available() and args.device != "cpu"
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    kind = MEASURED if cuda or args.device == "cpu" else CALCULATED
    pack = find_pack(config, args.supervised)
    # A calculation is for the GPU that is not here: only a CPU that is timed may be slow in bf16.
    slow = kind == MEASURED and not has_fast_bf16(device)
    dtype = config.train.precision
    dtype = dtype if dtype in DTYPES else "fp32" if slow else "bf16"
    parts = _parts(PartMaker(config, pack, dtype), names, args.what == "all")
    if old:
        check_comparable(old, kind, [part.name for part in parts])
    _check_folder(args.out)
    print(f"pack: {pack}")
    machine = describe_machine(device, ["python", "-m", "training.step_parts", *sys.argv[1:]])
    if kind == MEASURED:
        content = _measure(args, parts, device, machine, _identity(config, pack))
    else:
        if (args.out / RESULTS).exists() and read_results(args.out)["kind"] != CALCULATED:
            raise InputError(
                f"--out {args.out} holds measurements, and no GPU is here; name another"
            )
        records = [_calculated(part) for part in parts]
        content = {"schema": SCHEMA, "kind": kind, "machine": machine, "cases": records}
        content["settings"] = _identity(config, pack)
    for line in (failed := failures(content)):
        print(f"error: {line}", file=sys.stderr)
    _write(content, args.out)
    if old:
        print(f"\n{compare_table(old, content, None)}")
    return 1 if failed else 0


def _names(what: str) -> tuple[str, ...]:
    names = tuple(PARTS if what == "all" else what.split(","))
    if unknown := [name for name in names if name not in PARTS]:
        raise InputError(f"--what {unknown[0]} is no part; use all, or of {', '.join(PARTS)}")
    return names


def _parts(maker: PartMaker, names: tuple[str, ...], every: bool) -> list[StepPart]:
    """The parts of these names; of `every`, those that the model has not are named instead."""
    found = []
    for name in names:
        try:
            found.append(getattr(maker, name)())
        except InputError as error:
            if not every:
                raise
            print(f"left out: {error}")
    return found


def _identity(config: RunConfig, pack: StepPack) -> dict[str, Any]:
    """What the parts' times depend on, in keys that a refusal to resume can name."""
    model, train = config.model, config.train
    found: dict[str, Any] = {"model.pool": model.pool}
    found["model.projector_hidden_ratio"] = model.projector_hidden_ratio
    for name in ("vision", "llm"):
        backbone = getattr(model, name).config
        found |= {f"model.{name}.config.{key}": value for key, value in backbone.items()}
    found["train.modules"] = {name: module.train for name, module in train.modules}
    for key in ("precision", "gradient_checkpointing", "projector_backward", "loss_chunk_tokens"):
        found[f"train.{key}"] = getattr(train, key)
    return found | {"pack": str(pack), "pack.pairs": sum(n * n for n in pack.lengths)}


def _check_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise InputError(f"--out: {error}; name a folder that can be written to") from error


def _calculated(part: StepPart) -> dict[str, Any]:
    peaks = assumed(part.dtype)
    record = new_record(part.name, part.record(), peaks)
    floors = {mode: {"median_ms": floor_ms(record["shape"], mode, peaks)} for mode in part.modes}
    record["providers"] = {OURS: {"memory": {}, "timings": floors}}
    return record


def _measure(
    args: argparse.Namespace,
    parts: list[StepPart],
    device: torch.device,
    machine: dict[str, Any],
    identity: dict[str, Any],
) -> dict[str, Any]:
    traces = None if args.quick else args.out / "traces"
    min_ms = args.min_ms or (30.0 if args.quick else 100.0)
    settings = BenchSettings((OURS,), MODES, min_ms, traces=traces)
    content = begin(args.out, settings.record() | identity, machine, args.resume, MEASURED)
    subject = Subject(
        measure_part, _printed, lambda parts: len(parts) * PER_PART_S, "lower data.pack.max_tokens"
    )
    measure(parts, settings, device, content, args.out, subject)
    return content


def measure_part(
    part: StepPart, settings: BenchSettings, device: torch.device, peaks: Peaks, progress: Any
) -> dict[str, Any]:
    """As `kernels.profile.bench.measure_case`; errors are taken of the trainer's own results."""
    record = new_record(part.name, part.record(), peaks)
    module = part.build(device)
    calls = {OURS: part.ours(module, device)}
    if part.liger and (reason := liger_missing(device)):
        record["skipped"]["liger"] = reason
    elif part.liger:
        with noting_failure(record, "liger", device):
            calls["liger"] = part.liger(module, device)
    sets = part.inputs(module, device)
    expected = outputs_and_gradients(calls[OURS], sets[0])
    settings = replace(settings, modes=part.modes)
    return measure_calls(record, calls, sets, expected, settings, device, progress=progress)


def _printed(record: dict[str, Any]) -> str:
    rows = rows_of_parts([record])
    times = [f"  {row['provider']} {row['pack_ms']:.4g} ms a pack" for row in rows]
    return "\n".join([f"\n{record['case']}: {record['shape']['about']}", *times])


def _kernels(records: list[dict[str, Any]]) -> list[Table]:
    return [
        kernel_table(record, name)
        for record in records
        for name, found in record["providers"].items()
        if "kernels" in found
    ]


def _write(content: dict[str, Any], out: Path) -> None:
    records = content["cases"]
    table = parts_table(records, content["kind"] == MEASURED)
    print(f"\n{table}")
    write_json(out / RESULTS, content)
    write_csv(out / "results.csv", rows_of_parts(records))
    report = Report(content["machine"]["device"], content, (), tables=[table, *_kernels(records)])
    write_page(out / "report.html", [report], title="The parts of a training step")
    print("\nwritten:")
    for name in (RESULTS, "results.csv", "report.html"):
        print(f"  {out / name}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    sys.exit(main())
