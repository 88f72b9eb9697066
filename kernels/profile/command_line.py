"""The command line: what is asked for, and the cases and settings that follow from it."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kernels.profile.bench import BenchSettings
from kernels.profile.calculated import BANDWIDTH
from kernels.profile.cases import (
    SHAPE_HELP,
    SWEEP_HELP,
    SWEPT,
    Case,
    cpu_cases,
    default_cases,
    parse_shape,
    parse_sweep,
)
from kernels.profile.providers import PROVIDERS
from kernels.profile.roofline import MODES

QUICK = (
    "eager_grouped",
    "compile",
    "save",
    "recompute",
)  # and sweeps


STEP_PARTS = "training.step_parts"  # the command that profiles what is not the projector


def for_step_parts(argv: list[str]) -> list[str] | None:
    """The arguments of STEP_PARTS where --what or --config asks for it; None otherwise.

    Raises ValueError where only one of them does.
    """
    pre = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    pre.add_argument("--what", default="projector")
    pre.add_argument("--config")
    args, rest = pre.parse_known_args(argv)
    if args.config is None:
        if args.what != "projector":
            raise ValueError(f"--what {args.what}: of which model? give its --config CONFIG.yaml")
        return None
    return [args.config, "--what", args.what, *rest]


def parser(description: str | None) -> argparse.ArgumentParser:
    """All options."""
    providers = "\n".join(f"  {p.name:<14} {p.says}" for p in PROVIDERS.values())
    found = argparse.ArgumentParser(
        prog="python -m kernels.profile",
        description=description,
        epilog=f"{SHAPE_HELP}\n{SWEEP_HELP}\nProviders:\n{providers}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = found.add_argument
    add("--what", metavar="PART,..", help="parts of a step, or all: with --config (projector)")
    add("--config", metavar="CONFIG.yaml", help=f"hand over to python -m {STEP_PARTS}: its --help")
    add("--shape", type=_reading(parse_shape), action="append", help="a case, see below; repeat")
    add("--sweep", action="append", default=[], help="cases in a row, see below; repeat")
    add("--quick", action="store_true", help="a minute: two cases, few providers, shorter")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--out", type=Path, help="folder for the files (measured: runs/profile-TIME; else none)")
    add("--provider", action="append", choices=tuple(PROVIDERS), help="only these; repeat")
    add("--mode", action="append", choices=MODES, help="only these; repeat")
    add("--frozen-vit", action="store_true", help="x needs no gradient")
    add("--min-ms", type=_positive, help="timed per provider and mode (100; --quick 30)")
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
    return found


def cases_of(
    args: argparse.Namespace, old: dict[str, Any] | None
) -> tuple[list[dict[str, Any]], list[Case]]:
    """The sweeps as the file keeps them, and all cases: of shapes, sweeps, or the run before.

    Raises ValueError for a sweep that cannot be read.
    """
    usual = cpu_cases() if args.device == "cpu" else default_cases()
    few = usual if args.device == "cpu" else [usual[1], usual[3]]
    base = args.shape[0] if args.shape else few[0]
    sweeps, swept = [], []
    for text in args.sweep:
        key, found = parse_sweep(text, base)
        values = [getattr(case, SWEPT[key]) for case in found]
        values = [value[0] if isinstance(value, tuple) else value for value in values]
        rest = [part for part in base.name.split(",") if part.split("=")[0] not in (key, "p")]
        names = [case.name for case in found]
        sweeps.append({"key": key, "rest": ",".join(rest), "values": values, "cases": names})
        swept += found
    if swept:
        return sweeps, swept
    if args.shape or not old:
        return [], args.shape or (few if args.quick else usual)
    return [], [Case.of(record["shape"]) for record in old["cases"]]


def settings_of(args: argparse.Namespace, out: Path | None) -> BenchSettings:
    """--quick and sweeps: fewer providers and modes, shorter; what is asked for counts first."""
    every = tuple(name for name, provider in PROVIDERS.items() if provider.default)
    return BenchSettings(
        tuple(args.provider or (QUICK if args.quick or args.sweep else every)),
        tuple(args.mode or (("both",) if args.sweep else MODES)),
        args.min_ms or (5000.0 if args.sustained else 30.0 if args.quick else 100.0),
        args.frozen_vit,
        args.sustained,
        out / "traces" if out and args.trace and not args.sweep else None,
    )


def _reading(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:  # argparse would hide its message
            raise argparse.ArgumentTypeError(str(error)) from error

    return read


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
