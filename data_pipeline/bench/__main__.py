"""Measure the data pipeline, print a table, and write it as JSON.

python -m data_pipeline.bench [BENCHMARK ...] [--quick] [--out FILE.json]

planner  packing and balancing: quality on several mixes, samples/s, memory
index    indexing: samples/s per core, and what loading an index costs
loader   read, decode, tile and pack on two cores, against webdataset with worker processes;
         large photographs with and without decoding at a reduced scale
startup  from nothing to the first planned window of a large data set
prepare  entries/s and MB/s of the command that writes shards, for four formats
remote   samples from a web server: requests, bytes beyond those used, samples/s
"""

import argparse
import importlib
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from data_pipeline.cli import command_parser, run_cli
from data_pipeline.errors import InputError
from data_pipeline.files import write_atomically
from data_pipeline.machine import cpu_model, git_commit, num_cores, versions
from data_pipeline.paths import path_argument
from data_pipeline.text_table import text_table

NAMES = ("planner", "index", "loader", "startup", "prepare", "remote")
PACKAGES = ("numpy", "torch", "pillow", "simplejpeg", "webdataset", "sentencepiece", "fsspec")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command-line entry point."""
    options = _parse(arguments)
    names = list(dict.fromkeys(options.benchmarks)) or list(NAMES)
    modules = {name: _module(name) for name in names}  # all of them before the first minutes pass
    given = sys.argv[1:] if arguments is None else arguments
    record: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "data_pipeline.bench", *given]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": _hardware(),
        "versions": {
            "python": platform.python_version(),
            "system": platform.platform(),
            **versions(PACKAGES),
        },
        "commit": git_commit(),
        "results": {},
    }
    for name, module in modules.items():
        more = {"against": options.against} if name == "prepare" else {}
        record["results"][name] = module.measure(options.quick, **more)
        print("\n".join(_table(name, record["results"][name])), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.out, json.dumps(record, indent=1).encode() + b"\n")
    print(f"written to {options.out}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("data_pipeline.bench", __doc__)
    parser.add_argument(
        "benchmarks",
        nargs="*",
        metavar="BENCHMARK",
        help=f"any of {', '.join(NAMES)} (default: all)",
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, for a first look")
    parser.add_argument(
        "--against",
        type=Path,
        metavar="DIR",
        help="of prepare: another checkout, whose command runs in turn with this one's",
    )
    parser.add_argument(
        "--out",
        type=path_argument,
        metavar="FILE.json",
        default=Path("runs/data-bench.json"),
        help="(default: %(default)s)",
    )
    return parser.parse_args(arguments)


def _module(name: str) -> Any:
    if name not in NAMES:
        raise InputError(f"there is no benchmark {name!r}; name any of {', '.join(NAMES)}")
    try:
        return importlib.import_module(f"data_pipeline.bench.bench_{name}")
    except ModuleNotFoundError as error:
        raise InputError(
            f"the benchmark {name} needs the package {error.name}, which is not installed; "
            f"run: pip install {error.name}"
        ) from error


def _hardware() -> dict[str, Any]:
    return {
        "cpu": cpu_model(),
        "cores": num_cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        # Whatever else the machine does shows in the numbers.
        "load_average_before": [round(load, 2) for load in os.getloadavg()],
    }


def _table(name: str, results: Mapping[str, Any]) -> list[str]:
    """A line for each number, named by the keys that lead to it."""
    lines = text_table(list(_rows(results)), left=(0, 1)).splitlines()
    return [name, *(f"  {line}" for line in lines)]


def _rows(results: Any, label: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(results, Mapping):
        for key, value in results.items():
            yield from _rows(value, f"{label}: {key}" if label else str(key))
    elif isinstance(results, list) and any(isinstance(value, list | Mapping) for value in results):
        for number, value in enumerate(results):
            yield from _rows(value, f"{label}: {number}" if label else str(number))
    elif isinstance(results, list):
        yield label, "  ".join(map(_format, results))
    else:
        yield label, _format(results)


def _format(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


if __name__ == "__main__":
    run_cli(main)
