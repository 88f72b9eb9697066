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
"""

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from kernels.dispatch import interpreting
from kernels.profile.bench import BenchSettings, run_once
from kernels.profile.calculated import BANDWIDTH, calculate
from kernels.profile.cases import (
    SHAPE_HELP,
    SWEEP_HELP,
    Case,
    cpu_cases,
    default_cases,
    parse_shape,
    parse_sweep,
)
from kernels.profile.commands import ncu_commands, nsys_commands
from kernels.profile.compare import changes, check_comparable, compare_table
from kernels.profile.measured_run import begin, failures, measure
from kernels.profile.providers import PROVIDERS
from kernels.profile.results import RESULTS, SCHEMA, read_results, rows_of, write_csv, write_json
from kernels.profile.roofline import MODES
from kernels.profile.run_tables import EXPLANATION, floors_table, provider_list, targets_table
from kernels.profile.system import describe_machine
from kernels.profile.targets import judge

QUICK = ("eager_grouped", "compile", "save", "recompute")  # what --quick and sweeps take by default


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 1 where something failed or got slower."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        return _run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    runs = [read_results(path) for path in args.compare or ()]
    if len(runs) > 2:
        raise ValueError(f"--compare: {len(runs)} runs found; expected one or two")
    if len(runs) == 2:
        check_comparable(runs[0], runs[1]["kind"], [r["case"] for r in runs[1]["cases"]])
        return _compare(args, runs[0], runs[1], args.out)
    old = runs[0] if runs else None
    gpu = torch.cuda.is_available() and args.device != "cpu"
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    if gpu and interpreting():
        raise ValueError("TRITON_INTERPRET is set, under which kernels run in Python: unset it")
    sweeps, cases = _cases(args, device, old)
    settings = _settings(args, bool(sweeps))
    if args.print_ncu or args.print_nsys:
        ncu = ncu_commands(cases, settings) if args.print_ncu else []
        print("\n".join(ncu + (nsys_commands(cases, settings) if args.print_nsys else [])))
        return 0
    if args.once:
        run_once(cases[0], settings, device)
        return 0
    measuring = gpu or args.device == "cpu"
    kind = "measured" if measuring else "calculated"
    if old:
        check_comparable(old, kind, [case.name for case in cases])
    out = _out(args, measuring)
    machine = describe_machine(device, ["python", "-m", "kernels.profile", *sys.argv[1:]])
    if out and measuring:
        content = begin(out, settings, machine, args.resume)
        print(f"{machine['device']}, torch {machine['torch']}, triton {machine['triton']}")
        measure(cases, settings, device, content, out)
        if gpu:
            targets = [target for record in content["cases"] for target in judge(record)]
            content["targets"] = [asdict(target) for target in targets]
            print(f"\n{targets_table(targets)}")
        print(f"\n{EXPLANATION}")
    else:
        flops, rate = (value and value * 1e12 for value in (args.peak_tflops, args.bandwidth))
        records = calculate(cases, args.frozen_vit, flops, rate)
        content = {"schema": SCHEMA, "kind": kind, "machine": machine, "cases": records}
        print(f"{floors_table(records)}\n\nNothing was timed: no GPU was found.")
    content["sweeps"] = sweeps
    for line in (failed := failures(content)):
        print(f"error: {line}", file=sys.stderr)
    if out and content["cases"]:
        _write(content, out, ncu_commands(cases, settings) + nsys_commands(cases, settings))
    slower = _compare(args, old, content, out) if old else 0
    return 1 if failed else slower


def _cases(
    args: argparse.Namespace, device: torch.device, old: dict[str, Any] | None
) -> tuple[list[dict[str, Any]], list[Case]]:
    """The sweeps as the file keeps them, and all cases: of shapes, sweeps, or the run before."""
    cpu = device.type == "cpu" and args.device == "cpu"
    usual = cpu_cases() if cpu else default_cases()
    base = args.shape[0] if args.shape else usual[0] if cpu else usual[1]
    sweeps, swept = [], []
    for text in args.sweep or ():
        key, found = parse_sweep(text, base)
        values = [getattr(case, _FIELDS[key]) for case in found]
        values = [value[0] if isinstance(value, tuple) else value for value in values]
        rest = ",".join(
            part for part in base.name.split(",") if part.split("=")[0] not in (key, "p")
        )
        names = [case.name for case in found]
        sweeps.append({"key": key, "rest": rest, "values": values, "cases": names})
        swept += found
    if args.shape or swept:
        return sweeps, [*(args.shape if args.shape and not swept else ()), *swept]
    if old:
        return sweeps, [Case.of(record["shape"]) for record in old["cases"]]
    return sweeps, [usual[1], usual[3]] if args.quick and not cpu else usual


_FIELDS = {"n": "ns", "T": "tiles", "C": "channels", "F": "hidden", "D": "width"}


def _settings(args: argparse.Namespace, sweeping: bool) -> BenchSettings:
    """--quick and sweeps: fewer providers and modes, shorter; what is asked for counts first."""
    fewer = args.quick or sweeping
    every = tuple(name for name, provider in PROVIDERS.items() if provider.default)
    by_default = 5000.0 if args.sustained else 30.0 if args.quick else 200.0
    out = args.out or Path("runs") / time.strftime("profile-%Y%m%d-%H%M%S")
    args.out_or_default = out
    return BenchSettings(
        tuple(args.provider or (QUICK if fewer else every)),
        tuple(args.mode or (("both",) if sweeping else MODES)),
        args.min_ms or by_default,
        args.frozen_vit,
        args.sustained,
        out / "traces" if args.trace and not sweeping else None,
    )


def _out(args: argparse.Namespace, measuring: bool) -> Path | None:
    """The folder for the files, which can be written to: before minutes of measuring."""
    if args.resume and not args.out:
        raise ValueError("--resume goes on with a run in --out; name its folder")
    if not (args.out or measuring):
        return None
    out: Path = args.out_or_default
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise ValueError(f"--out: {error}; name a folder that can be written to") from error
    return out


def _write(content: dict[str, Any], out: Path, commands: list[str]) -> None:
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


def _compare(
    args: argparse.Namespace, old: dict[str, Any], new: dict[str, Any], out: Path | None
) -> int:
    """Print what changed, and a page of both beside each other into `out`."""
    table = compare_table(old, new, args.fail_above)
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
    limit = args.fail_above
    slower = [] if limit is None else [c for c in changes(old, new) if c.slower_by_more_than(limit)]
    return 1 if slower else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.profile",
        description=__doc__,
        epilog=f"{SHAPE_HELP}\n{SWEEP_HELP}\nProviders:\n{provider_list()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--shape", type=_reading(parse_shape), action="append", help="a case, see below; repeat")
    add("--sweep", type=_reading(_sweep), action="append", help="cases in a row, see below; repeat")
    add("--quick", action="store_true", help="a minute: two cases, few providers, shorter")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--out", type=Path, help="folder for the files (measured: runs/profile-TIME; else none)")
    add("--provider", action="append", choices=tuple(PROVIDERS), help="only these; repeat")
    add("--mode", action="append", choices=MODES, help="only these; repeat")
    add("--frozen-vit", action="store_true", help="x needs no gradient")
    add("--min-ms", type=_positive, help="timed per provider and mode (200; --quick 30)")
    add("--sustained", action="store_true", help="without rests between calls, 5 s each: a hot GPU")
    add("--no-trace", dest="trace", action="store_false", help="no traces, no table of kernels")
    add("--device", choices=("auto", "cpu"), default="auto", help="cpu: time this CPU")
    add("--compare", type=Path, nargs="+", metavar="OLD", help="a run before; two: measure nothing")
    add("--fail-above", type=_share, help="exit 1 where a time is longer by more, such as 5%%")
    add("--print-ncu", action="store_true", help="print commands for Nsight Compute, and end")
    add("--print-nsys", action="store_true", help="print commands for Nsight Systems, and end")
    add("--once", action="store_true", help="run each provider once, for these; measures nothing")
    add("--peak-tflops", type=_positive, help="TFLOP/s a calculation assumes (by dtype)")
    add("--bandwidth", type=_positive, help=f"TB/s a calculation assumes ({BANDWIDTH / 1e12:g})")
    return parser


def _reading(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:  # argparse would hide its message
            raise argparse.ArgumentTypeError(str(error)) from error

    return read


def _sweep(text: str) -> str:
    parse_sweep(text, default_cases()[1])
    return text


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} found; expected a number above 0")
    return value


def _share(text: str) -> float:
    return _positive(text.removesuffix("%")) / (100 if text.endswith("%") else 1)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    sys.exit(main())
