"""Measuring cases one after another into a file that is whole after every one of them."""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from kernels.profile.bench import BenchSettings, DeviceLostError, expected_s, measure_case
from kernels.profile.calculated import products_in
from kernels.profile.results import RESULTS, SCHEMA, read_results, write_json
from kernels.profile.roofline import Peaks
from kernels.profile.run_tables import case_table, kernel_table
from kernels.profile.timing import measure_peaks


@dataclass(frozen=True)
class Subject:
    """What is measured, where it is not the projector.

    measure: as `measure_case`. printed: its record, for the terminal. expected_s: of some cases on
    a GPU. remedy: where memory does not suffice.
    """

    measure: Callable[..., dict[str, Any]]
    printed: Callable[[dict[str, Any]], str]
    expected_s: Callable[[Sequence[Any]], float]
    remedy: str


SAME = ("torch", "triton", "device", "commit")  # of the machine, in all cases of one run


def begin(
    out: Path,
    settings: dict[str, Any],
    machine: dict[str, Any],
    resume: bool,
    kind: str = "measured",
) -> dict[str, Any]:
    """The content to go on with; ValueError where what is in `out` is another run's."""
    content: dict[str, Any] = {
        **{"schema": SCHEMA, "kind": kind, "machine": machine},
        **{"settings": settings, "failures": {}, "cases": []},
    }
    if not resume or not (out / RESULTS).exists():
        return content
    before = read_results(out)
    known = before.get("settings", {}) | before["machine"] | {"kind": before["kind"]}
    now = settings | {key: machine[key] for key in SAME} | {"kind": content["kind"]}
    pairs = [(key, value, known.get(key)) for key, value in now.items()]
    if differ := [f"{k} is {new!r}, was {old!r}" for k, new, old in pairs if not _same(new, old)]:
        raise ValueError(
            f"--resume: {out / RESULTS} is of another run ({'; '.join(differ)}); give the options "
            "it was started with, or another --out"
        )
    return before | {"machine": machine, "failures": {}}


def _same(value: Any, read: Any) -> bool:
    """Whether JSON gave it back; of a commit without the mark of changes, which results may be."""
    if isinstance(value, str) and isinstance(read, str):
        return value.removesuffix("+changes") == read.removesuffix("+changes")
    return (list(value) if isinstance(value, tuple) else value) == read


def measure(
    cases: Sequence[Any],
    settings: BenchSettings,
    device: torch.device,
    content: dict[str, Any],
    out: Path,
    subject: Subject | None = None,
) -> None:
    """Measure what `content` lacks, into it and into the file, and print each case as it ends.

    Each case has `name`, `dtype` and `torch_dtype`; without a subject they are the projector's.
    A failure ends neither the other cases nor, but for a lost GPU, the run; `failures` names it.
    """
    done = {record["case"] for record in content["cases"]}
    todo = [case for case in dict.fromkeys(cases) if case.name not in done]
    seconds = subject.expected_s(todo) if subject else expected_s(todo, settings, device)
    took = f"{seconds:.0f} s" if seconds < 120 else f"{math.ceil(seconds / 60)} min"
    print(
        f"{len(todo)} cases to measure, {len(cases) - len(todo)} there already; about "
        f"{took} on a GPU; each is in {out / RESULTS} when it ends",
        flush=True,
    )
    write_json(out / RESULTS, content)
    peaks: dict[str, Peaks] = {}
    said: set[str] = set()  # what was skipped and why, once
    bar = tqdm(todo, disable=None, file=sys.stderr, unit="case")
    for case in bar:
        try:
            if case.dtype not in peaks:
                bar.set_postfix_str("ceilings")
                peaks[case.dtype] = measure_peaks(device, case.torch_dtype, settings.min_ms)
                bar.write(_ceilings(peaks[case.dtype], case), sys.stdout)
            one = subject.measure if subject else measure_case
            record = one(case, settings, device, peaks[case.dtype], bar.set_postfix_str)
            content["cases"].append(record)
        except DeviceLostError as error:
            content["failures"][case.name] = f"the GPU stopped answering after {error}"
            break
        except Exception as error:  # the other cases are measured all the same
            content["failures"][case.name] = _first_line(
                error, subject.remedy if subject else "use fewer tiles (T=)"
            )
            continue
        finally:
            write_json(out / RESULTS, content)
        bar.write(subject.printed(record) if subject else _printed(record, said), sys.stdout)
        sys.stdout.flush()


def failures(content: dict[str, Any]) -> list[str]:
    """A line for every case, and every provider of one, that failed."""
    lines = [f"{case}: {why}" for case, why in content.get("failures", {}).items()]
    return lines + [
        f"{record['case']}: {name}: {why}"
        for record in content["cases"]
        for name, why in record.get("failed", {}).items()
    ]


def _printed(record: dict[str, Any], said: set[str]) -> str:
    tables = [case_table(record)]
    for name in ("save", *record["providers"]):
        if "kernels" in record["providers"].get(name, {}):
            tables.append(kernel_table(record, name))
            break  # the page has those of the others
    skipped = [f"{name} skipped: {why}" for name, why in record["skipped"].items()]
    new = [line for line in skipped if line not in said]
    said.update(new)
    return "\n" + "\n".join(map(str, [*tables, *new]))


def _ceilings(peaks: Peaks, case: Any) -> str:
    return (
        f"ceilings measured in this run: {peaks.flops / 1e12:.3g} TFLOP/s (a large product in "
        f"{products_in(case.dtype)}), {peaks.bandwidth / 1e12:.3g} TB/s (copy, read plus written)"
    )


def _first_line(error: Exception, remedy: str) -> str:
    line = f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"
    return line + (f"; {remedy}" if isinstance(error, torch.OutOfMemoryError) else "")
