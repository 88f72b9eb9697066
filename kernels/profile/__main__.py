"""Profile the projector: this repository's op beside eager PyTorch, torch.compile and Liger.

On a GPU every provider is timed on every case, with the ceilings of the GPU measured in the same
run, and tables, CSV, JSON, a roofline plot and a Chrome trace are written. Without a GPU nothing is
timed: calculated floors and the kernels' compile report are printed, `--out` writes the floors.

    python -m kernels.profile
    python -m kernels.profile --shape T=64,n=12 --shape T=64,n=8/12/16,p=.2/.3/.5,pool=resize
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch

from kernels.dispatch import interpreting
from kernels.profile import calculated, measured
from kernels.profile.bench import BenchSettings
from kernels.profile.cases import SHAPE_HELP, Case, default_cases, parse_shape
from kernels.profile.providers import PROVIDERS
from kernels.profile.results import write_csv, write_json
from kernels.profile.roofline import MODES, Peaks
from kernels.profile.system import describe_machine
from kernels.profile.text_report import format_providers


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 1 where something failed."""
    arguments = _parser().parse_args(argv)
    cases = arguments.shape or default_cases()
    try:  # before minutes of measuring, in case it cannot be written
        if arguments.out:
            arguments.out.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=arguments.out).close()
    except OSError as error:
        print(f"error: --out: {error}; name a folder that can be written to", file=sys.stderr)
        return 2
    if torch.cuda.is_available():
        if interpreting():
            print("error: TRITON_INTERPRET is set, under which kernels run in Python: unset it")
            return 2
        device = torch.device("cuda", torch.cuda.current_device())
        return run_measured(arguments, cases, device)
    return run_calculated(arguments, cases)


def run_calculated(arguments: argparse.Namespace, cases: list[Case]) -> int:
    """Without a GPU: print what can be calculated; files only where --out says so."""
    peaks = Peaks(arguments.peak_tflops * 1e12, arguments.bandwidth * 1e12)
    content, compiles = calculated.report(
        cases, peaks, arguments.frozen_vit, arguments.compile_report
    )
    if arguments.out:
        from kernels.profile.plots import plot_calculated  # matplotlib, only where it draws

        machine = describe_machine(torch.device("cpu"), _command())
        files = [arguments.out / f"calculated.{suffix}" for suffix in ("json", "csv", "png")]
        write_json(files[0], content | {"machine": machine})
        write_csv(files[1], content["cases"])
        plot_calculated(cases, peaks, arguments.frozen_vit, files[2])
        _print_files(files)
    return 0 if compiles else 1


def run_measured(arguments: argparse.Namespace, cases: list[Case], device: torch.device) -> int:
    """On a GPU: measure, print, write."""
    settings = BenchSettings(
        tuple(arguments.provider or PROVIDERS),
        tuple(arguments.mode or MODES),
        arguments.min_ms,
        arguments.frozen_vit,
    )
    out = arguments.out or Path("runs") / time.strftime("profile-%Y%m%d-%H%M%S")
    out.mkdir(parents=True, exist_ok=True)  # before minutes of measuring, in case it cannot be
    machine = describe_machine(device, _command())
    print(f"{machine['device']}, torch {machine['torch']}, triton {machine['triton']}")
    results, failures, clocks = measured.measure(cases, settings, device)
    measured.print_summary(results, failures)
    if results:
        description = {"machine": machine, "nvidia_smi": clocks}
        files = measured.write_files(
            results, failures, description, device, out, trace=arguments.trace
        )
        _print_files(files)
    return 1 if failures else 0


def _command() -> list[str]:
    return ["python", "-m", "kernels.profile", *sys.argv[1:]]


def _print_files(files: list[Path]) -> None:
    print("\nwritten:")
    for path in files:
        print(f"  {path}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.profile",
        description=__doc__,
        epilog=f"{SHAPE_HELP}\nProviders:\n{format_providers()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--shape", type=_shape, action="append", metavar="SHAPE", help="a case, see below; repeat")
    add("--out", type=Path, help="folder for the files (GPU: runs/profile-TIME; else none)")
    add("--provider", action="append", choices=tuple(PROVIDERS), help="only these; repeat")
    add("--mode", action="append", choices=MODES, help="only these; repeat")
    add("--frozen-vit", action="store_true", help="x needs no gradient")
    add("--min-ms", type=_positive, default=200.0, help="timed per provider and mode (200)")
    add("--no-trace", dest="trace", action="store_false", help="write no Chrome trace")
    add(
        "--peak-tflops",
        type=_positive,
        default=calculated.ASSUMED.flops / 1e12,
        help="TFLOP/s the calculation assumes (%(default)g); measured on a GPU",
    )
    add(
        "--bandwidth",
        type=_positive,
        default=calculated.ASSUMED.bandwidth / 1e12,
        help="TB/s the calculation assumes (%(default)g); measured on a GPU",
    )
    add(
        "--no-compile-report",
        dest="compile_report",
        action="store_false",
        help="without a GPU: do not compile the kernels (a minute or more)",
    )
    return parser


def _shape(text: str) -> Case:
    try:
        return parse_shape(text)
    except ValueError as error:  # argparse would hide its message
        raise argparse.ArgumentTypeError(str(error)) from error


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} found; expected a number above 0")
    return value


if __name__ == "__main__":
    sys.exit(main())
