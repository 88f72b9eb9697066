"""Profile the projector: this repository's op beside eager PyTorch, torch.compile and libraries.

On a GPU every provider is timed on every case, with the ceilings of the GPU measured in the same
run; each case is written when it ends (results.json), and in the end a page (report.html), a table
(results.csv), pictures and traces. Without a GPU floors are calculated, in the same files; --device
cpu times this CPU, at small shapes.

    python -m kernels.profile
    python -m kernels.profile --quick --resume --out runs/quick
    python -m kernels.profile --shape T=64,n=12 --sweep n=4..27 --sweep T=1,2,4..256
    python -m kernels.profile --compare runs/before --fail-above 5%
    python -m kernels.profile --shape T=64,n=12 --print-ncu
    python -m kernels.profile --what all --config training/configs/digits.yaml --out runs/parts
"""

import argparse
import runpy
import signal
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from kernels.dispatch import interpreting
from kernels.profile.bench import BenchSettings, run_once
from kernels.profile.calculated import calculate
from kernels.profile.cases import Case
from kernels.profile.command_line import (
    STEP_PARTS,
    cases_of,
    for_step_parts,
    parser,
    settings_of,
)
from kernels.profile.commands import ncu_commands, nsys_commands
from kernels.profile.compare import changes, check_comparable, compare_table
from kernels.profile.measured_run import begin, failures, measure
from kernels.profile.results import RESULTS, SCHEMA, read_results, rows_of, write_csv, write_json
from kernels.profile.run_tables import EXPLANATION, floors_table, targets_table
from kernels.profile.system import describe_machine
from kernels.profile.targets import judge

Content = dict[str, Any]  # of results.json


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 1 where something failed or got slower."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if given := for_step_parts(argv):
            return _step_parts(given)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    args = parser(__doc__).parse_args(argv)
    try:
        return _run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; --resume goes on", file=sys.stderr)
        return 128 + signal.SIGINT


def _run(args: argparse.Namespace) -> int:
    runs = [read_results(path) for path in args.compare or ()]
    if len(runs) > 2:
        raise ValueError(f"--compare: {len(runs)} runs found; expected one or two")
    if any(run["kind"].endswith(" step") for run in runs):
        raise ValueError(
            f"--compare: a run of a step's parts; use python -m {STEP_PARTS} --compare"
        )
    if len(runs) == 2:
        check_comparable(runs[0], runs[1]["kind"], [r["case"] for r in runs[1]["cases"]])
        return _compare(args, runs[0], runs[1], args.out)
    old = runs[0] if runs else None
    device = _device(args)
    measuring = device.type == "cuda" or args.device == "cpu"
    sweeps, cases = cases_of(args, old)
    if args.print_ncu or args.print_nsys or args.once:
        return _for_nsight(args, cases, device)
    if old:
        names = [case.name for case in cases]
        check_comparable(old, "measured" if measuring else "calculated", names)
    out = _folder(args, measuring)
    settings = settings_of(args, out)
    machine = describe_machine(device, ["python", "-m", "kernels.profile", *sys.argv[1:]])
    if out and measuring:
        content = begin(out, settings.record(), machine, args.resume)
        content["sweeps"] = sweeps
        _measure(cases, settings, device, content, out)
    else:
        if out and (out / RESULTS).exists() and read_results(out)["kind"] == "measured":
            raise ValueError(f"--out {out} holds measurements, and there is no GPU; name another")
        content = _calculate(args, cases, machine) | {"sweeps": sweeps}
    for line in (failed := failures(content)):
        print(f"error: {line}", file=sys.stderr)
    if out and content["cases"]:
        _write(content, out, ncu_commands(cases, settings) + nsys_commands(cases, settings))
    slower = _compare(args, old, content, out) if old else 0
    return 1 if failed else slower


def _step_parts(argv: list[str]) -> int:
    """Run the command of a step's parts, which are the trainer's: by name, none is imported."""
    sys.argv = [STEP_PARTS, *argv]
    try:
        runpy.run_module(STEP_PARTS, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1
    return 0


def _device(args: argparse.Namespace) -> torch.device:
    if args.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if interpreting():
        raise ValueError("TRITON_INTERPRET is set, under which kernels run in Python: unset it")
    return torch.device("cuda", torch.cuda.current_device())


def _for_nsight(args: argparse.Namespace, cases: list[Case], device: torch.device) -> int:
    settings = settings_of(args, None)
    if args.once:
        run_once(cases[0], settings, device)
    for wanted, commands in ((args.print_ncu, ncu_commands), (args.print_nsys, nsys_commands)):
        for line in commands(cases, settings) if wanted else ():
            print(line)
    return 0


def _folder(args: argparse.Namespace, measuring: bool) -> Path | None:
    """The folder for the files, which can be written to: before minutes of measuring."""
    if args.resume and not args.out:
        raise ValueError("--resume goes on with a run in --out; name its folder")
    if not args.out and not measuring:
        return None
    out: Path = args.out or Path("runs") / time.strftime("profile-%Y%m%d-%H%M%S")
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise ValueError(f"--out: {error}; name a folder that can be written to") from error
    return out


def _measure(
    cases: list[Case], settings: BenchSettings, device: torch.device, content: Content, out: Path
) -> None:
    machine = content["machine"]
    print(f"{machine['device']}, torch {machine['torch']}, triton {machine['triton']}")
    measure(cases, settings, device, content, out)
    if device.type == "cuda":
        targets = [target for record in content["cases"] for target in judge(record)]
        content["targets"] = [asdict(target) for target in targets]
        print(f"\n{targets_table(targets)}")
    print(f"\n{EXPLANATION}")


def _calculate(args: argparse.Namespace, cases: list[Case], machine: dict[str, Any]) -> Content:
    flops, rate = (value and value * 1e12 for value in (args.peak_tflops, args.bandwidth))
    records = calculate(cases, args.frozen_vit, flops, rate)
    print(f"{floors_table(records)}\n\nNothing was timed: no GPU was found.")
    return {"schema": SCHEMA, "kind": "calculated", "machine": machine, "cases": records}


def _write(content: Content, out: Path, commands: list[str]) -> None:
    """All files of a run, and their names."""
    from kernels.profile.html_report import Report, write_page
    from kernels.profile.plots import draw

    write_json(out / RESULTS, content)
    write_csv(out / "results.csv", [row for record in content["cases"] for row in rows_of(record)])
    pictures = draw(content, out)
    write_page(out / "report.html", [Report(content["kind"], content, pictures, commands)])
    print("\nwritten:")
    for path in (out / RESULTS, out / "results.csv", out / "report.html", *pictures):
        print(f"  {path}")


def _compare(args: argparse.Namespace, old: Content, new: Content, out: Path | None) -> int:
    """Print what changed, and write a page of both beside each other into `out`."""
    limit, table = args.fail_above, compare_table(old, new, args.fail_above)
    print(f"\n{table}")
    if out:
        from kernels.profile.html_report import Report, write_page
        from kernels.profile.plots import draw

        reports = []
        for name, run in (("old", old), ("new", new)):
            (folder := out / f"compare-{name}").mkdir(parents=True, exist_ok=True)
            reports.append(Report(f"{name}: {run['machine']['device']}", run, draw(run, folder)))
        write_page(out / "compare.html", reports, table)
        print(f"\nwritten:\n  {out / 'compare.html'}")
    slower = limit is not None and any(c.slower_by_more_than(limit) for c in changes(old, new))
    return 1 if slower else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    sys.exit(main())
