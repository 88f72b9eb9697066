"""`python -m data_pipeline.prepare` on small pictures, which make each entry's own cost show.

Whole commands, start-up included, and without it: the CPU time of a source of one entry taken off.
"""

import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from data_pipeline.machine import git_commit

RUNS = 3  # of each command; more where the machine is not busy
HERE = Path(__file__).parents[2]
_WORDS = [
    "a",
    "the",
    "red",
    "house",
    "with",
    "small",
    "windows",
    "stands",
    "beside",
    "an",
    "old",
    "tree",
    "near",
    "two",
    "boats",
]

Written = tuple[str, Path]
"""--format, and the source to give."""


def measure(quick: bool, against: Path | None = None) -> dict[str, Any]:
    """Entries/s and MB/s by format; with `against`, another checkout's beside them.

    Both run the same commands on the same files, in turn; the best of `RUNS` counts.
    """
    entries, runs = (300, 1) if quick else (8_000, RUNS)
    checkouts = {"here": HERE, **({"against": against.resolve()} if against else {})}
    result: dict[str, Any] = {"entries": entries, "runs": runs}
    if against:
        result["against_commit"] = git_commit(against)
    with tempfile.TemporaryDirectory(prefix="bench-prepare-") as folder:
        place = Path(folder)
        for name, write in SOURCES.items():
            one, many = (_written(write, place / f"{name}-{n}", n) for n in (1, entries))
            taken = _best(checkouts, {"start": one, "whole": many}, runs, place / "out")
            result[name] = _rates(taken, entries, _bytes(many[1]))
            result[name]["command"] = f"python -m data_pipeline.prepare --format {many[0]} SRC OUT"
    return result


def _best(
    checkouts: dict[str, Path], sources: dict[str, Written], runs: int, out: Path
) -> dict[str, dict[str, tuple[float, float] | None]]:
    """Checkout -> source -> the least seconds and CPU seconds; None where it does not read it."""
    found: dict[str, dict[str, list[tuple[float, float] | None]]] = {
        name: {source: [] for source in sources} for name in checkouts
    }
    for _ in range(runs):
        for source, written in sources.items():
            for name, root in checkouts.items():
                found[name][source].append(_run(root, *written, out))
    return {
        name: {source: _least(taken) for source, taken in of.items()} for name, of in found.items()
    }


def _least(taken: list[tuple[float, float] | None]) -> tuple[float, float] | None:
    whole = [pair for pair in taken if pair is not None]
    return (min(wall for wall, _ in whole), min(cpu for _, cpu in whole)) if whole else None


def _run(root: Path, format: str, source: Path, out: Path) -> tuple[float, float] | None:
    """Seconds and CPU seconds of one command; None if it fails."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "data_pipeline.prepare", "--format", format]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    ended = subprocess.run([*command, str(source), str(out)], cwd=root, capture_output=True)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if ended.returncode:
        return None
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _rates(
    taken: dict[str, dict[str, tuple[float, float] | None]], entries: int, size: int
) -> dict[str, Any]:
    rates: dict[str, Any] = {}
    for name, of in taken.items():
        if (start := of["start"]) is None or (whole := of["whole"]) is None:
            rates[name] = "not read"
            continue
        rates[name] = {
            "entries_per_s": round(entries / whole[0]),
            "MB_per_s": round(size / 1e6 / whole[0], 3),
            "entries_per_cpu_s": round(entries / whole[1]),
            # Noise may take all that a few entries cost.
            "entries_per_cpu_s_without_start": round(entries / max(whole[1] - start[1], 1e-3)),
            "start_cpu_s": round(start[1], 3),
        }
    if isinstance(rates.get("against"), dict):
        rates["ratio"] = {
            key: round(rates["here"][key] / rates["against"][key], 2)
            for key in ("entries_per_s", "entries_per_cpu_s", "entries_per_cpu_s_without_start")
        }
    return rates


def _written(write: Callable[[Path, int], Written], folder: Path, entries: int) -> Written:
    folder.mkdir()
    return write(folder, entries)


def _bytes(source: Path) -> int:
    """Bytes of the files that a source holds or names."""
    folder = source if source.is_dir() or source.suffix == ".parquet" else source.parent
    files = [folder] if folder.is_file() else folder.rglob("*")
    return sum(path.stat().st_size for path in files if path.is_file())


def _llava(folder: Path, entries: int) -> Written:
    records = [
        {
            "id": f"{number:09d}",
            "image": _picture_file(folder, number),
            "conversations": [
                {"from": "gpt" if turn % 2 else "human", "value": text}
                for turn, text in enumerate(_texts(number))
            ],
        }
        for number in range(entries)
    ]
    (folder / "data.json").write_text(json.dumps(records))
    return "llava", folder / "data.json"


def _messages(folder: Path, entries: int) -> Written:
    with (folder / "data.jsonl").open("w") as file:
        for number in range(entries):
            turns = [
                {"role": "assistant" if turn % 2 else "user", "content": text}
                for turn, text in enumerate(_texts(number))
            ]
            record = {"messages": turns, "images": [_picture_file(folder, number)]}
            file.write(json.dumps(record) + "\n")
    return "messages", folder / "data.jsonl"


def _parquet(folder: Path, entries: int) -> Written:
    rows = []
    for number in range(entries):
        first, second, third, fourth = _texts(number)
        texts = [
            {"user": first.removeprefix("<image>\n"), "assistant": second},
            {"user": third, "assistant": fourth},
        ]
        picture = {"bytes": _picture(number), "path": None}
        rows.append({"images": [picture], "texts": texts, "source": "bench"})
    pq.write_table(pa.Table.from_pylist(rows), folder / "data.parquet")
    return "finevision", folder / "data.parquet"


def _captions(folder: Path, entries: int) -> Written:
    for number in range(entries):
        picture = folder / _picture_file(folder, number)
        picture.with_suffix(".txt").write_text(_texts(number)[1])
    return "folder", folder


SOURCES: dict[str, Callable[[Path, int], Written]] = {
    "LLaVA JSON": _llava,
    "messages JSONL": _messages,
    "parquet with pictures": _parquet,
    "folder": _captions,
}


def _texts(number: int) -> list[str]:
    """Two questions with their answers, the picture in the first."""
    rng = np.random.default_rng(number)
    lengths = (10, 30, 8, 40)
    question, *others = (" ".join(rng.choice(_WORDS, length)) for length in lengths)
    return [f"<image>\n{question}", *others]


def _picture_file(folder: Path, number: int) -> str:
    name = f"{number:06d}.jpg"
    (folder / name).write_bytes(_picture(number))
    return name


def _picture(number: int) -> bytes:
    """A JPEG of 64 x 48."""
    buffer = BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((64, 48)).save(buffer, "JPEG")
    return buffer.getvalue()
