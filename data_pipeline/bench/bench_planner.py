"""Joint packing and balancing, measured: quality on several mixes, speed, memory.

Times are of CPU, of one core: others may use the machine at the same time. Each mix is planned
window by window as in training; the final step, which holds what is left, is not measured.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_pipeline.balance import DEFAULT_COST
from data_pipeline.balance.deal import Ints
from data_pipeline.balance.fit import best_fit
from data_pipeline.bench.mixes import MIXES, draw_mix
from data_pipeline.stats.measures import SampleCosts, fewest_packs
from data_pipeline.stats.measures import measure as measure_packs
from data_pipeline.stats.simulation import WINDOW_SAMPLES, PackBudget, plan_all, planned_windows

_SEED = 1
_PACKS_PER_STEP = 64


def measure(quick: bool) -> dict[str, Any]:
    """Quality and speed per mix; carried samples over many windows; memory of a long stream."""
    windows = 2 if quick else 6
    cases = [(mix, length, _PACKS_PER_STEP) for mix in MIXES for length in (8192, 16384)]
    cases += [("standard", 8192, packs) for packs in (1, 8, 1024)]
    cases += [("many_images", 16384, 8), ("many_images", 32768, _PACKS_PER_STEP)]
    found = {}
    for mix, max_tokens, packs in tqdm(cases, "planner", disable=None, leave=False):
        budget = PackBudget(max_tokens, packs, seed=_SEED)
        found[f"{mix}, {max_tokens} tokens, {packs} packs"] = _quality(mix, budget, windows)
    streams = (100_000, 1_000_000) if quick else (1_000_000, 10_000_000)
    return {
        "mixes": found,
        "carried_over_60_windows": _carried("standard", 8192, 60, 4000 if quick else 20_000),
        "streams": [_stream_in_subprocess(samples) for samples in streams],
    }


def _quality(mix: str, budget: PackBudget, windows: int) -> dict[str, Any]:
    tokens, tiles = draw_mix(mix, _SEED, windows * WINDOW_SAMPLES, budget.max_tokens)
    per_step, max_tokens = budget.packs_per_step, budget.max_tokens
    samples = SampleCosts(tokens, tiles, DEFAULT_COST.flops(tokens, tiles))
    started = time.process_time()
    pack, num_steps = plan_all(np.arange(len(tokens)), samples, budget, WINDOW_SAMPLES)
    seconds = time.process_time() - started
    window = tokens[:WINDOW_SAMPLES]
    decreasing = (int(best_fit(np.sort(window)[::-1], max_tokens).max()) + 1) * max_tokens
    least = fewest_packs(window, max_tokens) * max_tokens
    return asdict(measure_packs(samples, pack, per_step, num_steps - 1, max_tokens)) | {
        "padding_of_best_fit_decreasing": 1 - int(window.sum()) / decreasing,
        "padding_lower_bound": 1 - int(window.sum()) / least,
        "samples_per_cpu_s": len(tokens) / seconds,
    }


def _carried(mix: str, max_tokens: int, windows: int, window: int) -> dict[str, float]:
    """How much is left over to the next window, and how often the same sample at most."""
    tokens, tiles = draw_mix(mix, _SEED, windows * window, max_tokens)
    times = np.zeros(len(tokens), dtype=np.int64)
    shares = []
    budget = PackBudget(max_tokens, _PACKS_PER_STEP, seed=_SEED)
    for part in planned_windows(_windows(tokens, tiles, window), budget):
        left = part.ids[part.packing.pack < 0]
        times[left] += 1
        shares.append(int(tokens[left].sum()) / (max_tokens * _PACKS_PER_STEP))
    return {
        "window_samples": window,
        "most_steps_worth_carried": max(shares),
        "mean_steps_worth_carried": float(np.mean(shares[:-1])),
        "most_times_a_sample_was_carried": int(times.max()),
    }


def _windows(tokens: Ints, tiles: Ints, size: int) -> Iterator[tuple[Ints, Ints, Ints]]:
    for start in range(0, len(tokens), size):
        ids = np.arange(start, min(start + size, len(tokens)))
        yield ids, tokens[ids], tiles[ids]


def _drawn_windows(samples: int) -> Iterator[tuple[Ints, Ints, Ints]]:
    """Windows whose lengths are drawn when they are asked for, and then forgotten."""
    for number, start in enumerate(range(0, samples, WINDOW_SAMPLES)):
        lengths = draw_mix("standard", number, min(WINDOW_SAMPLES, samples - start), 8192)
        yield start + np.arange(len(lengths.tokens)), *lengths


def _stream_in_subprocess(samples: int) -> dict[str, float]:
    """`stream` in a process of its own, whose peak memory is that of nothing else."""
    command = [sys.executable, "-m", "data_pipeline.bench.bench_planner", str(samples)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    numbers: dict[str, float] = json.loads(done.stdout)
    return numbers


def stream(samples: int) -> dict[str, float]:
    """Plan a stream of samples, of which no more than a window is ever held."""
    before = _peak_mib()
    placed = steps = 0
    seconds = 0.0
    planned = planned_windows(_drawn_windows(samples), PackBudget(8192, _PACKS_PER_STEP))
    started = time.process_time()
    for part in planned:
        placed += int((part.packing.pack >= 0).sum())
        steps += part.packing.num_steps
    seconds = time.process_time() - started
    return {
        "samples": samples,
        "placed": placed,
        "steps": steps,
        "cpu_s_with_drawing_lengths": seconds,
        "peak_rss_mib": _peak_mib(),
        "rss_before_mib": before,
    }


def _peak_mib() -> float:
    """Most memory this program has held; `getrusage` would count its parent's before `exec`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status has no VmHWM: memory is measured on Linux only")


if __name__ == "__main__":
    print(json.dumps(stream(int(sys.argv[1]))))
