"""On a GPU: measure every case, print the tables and targets, write the files."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from kernels.profile.bench import BenchSettings, CaseResult, DeviceLostError, measure_case
from kernels.profile.cases import Case
from kernels.profile.results import rows_of, write_csv, write_json
from kernels.profile.roofline import Peaks
from kernels.profile.system import clocks, datasheet
from kernels.profile.targets import judge
from kernels.profile.text_report import EXPLANATION, format_case, format_targets
from kernels.profile.timing import measure_peaks


def measure(
    cases: Sequence[Case], settings: BenchSettings, device: torch.device
) -> tuple[list[CaseResult], list[str], dict[str, Any]]:
    """Measure the cases one after another and print each as it ends.

    Returns the results, the failures (one line each), and nvidia-smi's clocks at both ends. What
    was measured before a failure or Ctrl-C is returned, so that it can be written.
    """
    results: list[CaseResult] = []
    failures: list[str] = []
    peaks: dict[str, Peaks] = {}
    said: set[tuple[str, str]] = set()  # what was skipped and why, once
    smi: dict[str, Any] = {"before": clocks(device)}
    bar = tqdm(cases, disable=None, file=sys.stderr, unit="case")
    try:
        for case in bar:
            try:
                if case.dtype not in peaks:
                    bar.set_postfix_str("ceilings")
                    peaks[case.dtype] = measure_peaks(device, case.torch_dtype, settings.min_ms)
                    bar.write(_format_peaks(peaks[case.dtype], case.dtype, device), sys.stdout)
                result = measure_case(
                    case, settings, device, peaks[case.dtype], bar.set_postfix_str
                )
            except DeviceLostError:
                raise
            except Exception as error:  # the other cases are measured all the same
                failures.append(f"{case.name}: {_first_line(error)}{_advice(error)}")
                continue
            results.append(result)
            bar.write(f"\n{format_case(result)}", sys.stdout)
            for name, why in result.skipped.items():
                if (name, why) not in said:
                    bar.write(f"{name} skipped: {why}", sys.stdout)
                    said.add((name, why))
            smi["after the last case"] = clocks(device)
            failures += [f"{case.name}: {name}: {why}" for name, why in result.failed.items()]
    except DeviceLostError as error:
        failures.append(f"the GPU stopped answering after {error}; later cases were not measured")
    except KeyboardInterrupt:
        failures.append("interrupted; later cases were not measured")
    bar.close()
    return results, failures, smi


def _format_peaks(peaks: Peaks, dtype: str, device: torch.device) -> str:
    measured = (
        f"ceilings measured in this run: {peaks.flops / 1e12:.0f} TFLOP/s ({dtype} matrix product "
        f"of side 8192), {peaks.bandwidth / 1e12:.2f} TB/s (copy, read plus written)"
    )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    stated = datasheet(name)
    if not stated:
        return measured
    return (
        f"{measured}\nthe datasheet of {name} states {stated['bf16_tflops']} TFLOP/s (bf16) and "
        f"{stated['tb_per_s']} TB/s"
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"


def _advice(error: Exception) -> str:
    return "; use fewer tiles (T=)" if isinstance(error, torch.OutOfMemoryError) else ""


def print_summary(results: Sequence[CaseResult], failures: Sequence[str]) -> None:
    """What the columns mean, the targets, and what failed."""
    if results:
        print(f"\n{EXPLANATION}\n\n{format_targets(judge(results))}")
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)


def write_files(
    results: Sequence[CaseResult],
    failures: Sequence[str],
    description: dict[str, Any],
    device: torch.device,
    out: Path,
    trace: bool,
) -> list[Path]:
    """JSON, CSV, PNG and, where asked for, the trace of the most mixed case."""
    from kernels.profile.plots import plot_measured
    from kernels.profile.trace import TRACE, write_trace

    paths = [out / "results.json", out / "results.csv", out / "roofline.png"]
    content = description | {
        "kind": "measured",
        "failures": list(failures),
        "cases": [_case_entry(result) for result in results],
        "targets": [asdict(target) | {"met": target.met} for target in judge(results)],
    }
    write_json(paths[0], content)
    write_csv(paths[1], [row for result in results for row in rows_of(result)])
    plot_measured(results, description["machine"]["device"], paths[2])
    if trace:
        try:
            write_trace(max(results, key=lambda r: len(set(r.case.sides))), device, out)
            paths.append(out / TRACE)
        except Exception as error:  # the numbers are written already
            print(f"error: no trace: {_first_line(error)}", file=sys.stderr)
    return paths


def _case_entry(result: CaseResult) -> dict[str, Any]:
    return {
        "shape": asdict(result.case),
        "sides": list(result.case.sides),
        "ceilings": {
            "tflops": result.peaks.flops / 1e12,
            "tb_per_s": result.peaks.bandwidth / 1e12,
        },
        "input_sets": result.input_sets,
        "timed_twice": result.repeated,
        "noise": result.noise,
        "skipped": result.skipped,
        "failed": result.failed,
        "errors": {name: found.errors for name, found in result.measured.items()},
        "measurements": rows_of(result),
    }
